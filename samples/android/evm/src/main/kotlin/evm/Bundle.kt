package evm

import java.io.File
import java.io.FileNotFoundException
import java.io.IOException
import java.security.MessageDigest

/** A bundle on disk whose hashes have been checked. */
class Bundle private constructor(val folder: File, val manifest: Manifest) {
    /** The path of a file of the bundle. */
    fun file(name: String) = File(folder, name)

    companion object {
        /** Opens the bundle in [folder] and checks the hash of every file. Throws [BundleException]. */
        fun open(folder: File): Bundle {
            if (!folder.isDirectory) {
                val what = if (folder.exists()) "is a file, not a bundle folder" else "does not exist"
                throw BundleException("bundle $folder $what", "make one with evm-export", "bundle.missing")
            }
            val manifest = Manifest.read(folder)
            if (manifest.rejected) {
                val failures = manifest.failures.joinToString("; ")
                throw BundleException("bundle $folder was rejected at export: $failures", code = "bundle.rejected")
            }
            for ((name, hash) in manifest.files) check(folder, name, hash)
            return Bundle(folder, manifest)
        }

        private fun check(folder: File, name: String, hash: String) {
            val have = try {
                sha256(File(folder, name))
            } catch (_: FileNotFoundException) {
                val message = "bundle $folder: $name is missing"
                throw BundleException(message, "copy the whole bundle again", "file.missing", name)
            } catch (error: IOException) {
                val message = "bundle $folder: $name cannot be read: ${error.message}"
                throw BundleException(message, code = "file.missing", where = name)
            }
            if (have != hash) {
                val message = "bundle $folder: $name is damaged (its sha256 differs)"
                throw BundleException(message, "copy the bundle again", "file.damaged", name)
            }
        }
    }
}

private fun sha256(file: File): String {
    val digest = MessageDigest.getInstance("SHA-256")
    val block = ByteArray(1 shl 16)
    file.inputStream().use { stream ->
        generateSequence { stream.read(block).takeIf { it >= 0 } }.forEach { digest.update(block, 0, it) }
    }
    return digest.digest().joinToString("") { "%02x".format(it) }
}
