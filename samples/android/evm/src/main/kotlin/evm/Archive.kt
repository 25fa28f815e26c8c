package evm

import java.io.File
import java.io.IOException
import java.util.zip.ZipEntry
import java.util.zip.ZipFile
import kotlin.math.max
import kotlin.math.min

private const val MAX_FILES = 10_000
private const val MAX_BYTES = 4L shl 30 // largest unpacked size of a bundle
private const val MAX_RATIO = 200 // largest ratio of unpacked to packed size; more is a zip bomb
private const val SMALL = 1L shl 20 // files up to this size in bytes may have any ratio

/**
 * Unpacks the untrusted zip [path] below the new folder [into] and returns the bundle's folder.
 *
 * Nothing is written outside [into]. Names that leave the folder, duplicate entries and zip bombs are refused before or
 * during unpacking, by the real sizes and not by those that the zip states. Links become files. Throws [BundleException].
 */
fun unpack(path: File, into: File): File {
    try {
        ZipFile(path).use { zip ->
            val entries = zip.entries().toList().filterNot { it.name.endsWith("/") }
            check(path, entries)
            entries.fold(MAX_BYTES) { left, entry -> left - unpack(path, zip, entry, into, left) }
        }
    } catch (error: IOException) { // ZipException, and other IOExceptions from Android's own checks
        throw BundleException("$path is damaged or not a zip file: ${error.message}", "copy the file again", "zip.damaged")
    } catch (error: IllegalArgumentException) { // names with an invalid encoding
        throw BundleException("$path is damaged or not a zip file: ${error.message}", "copy the file again", "zip.damaged")
    }
    // Folders without a manifest do not count, such as __MACOSX, which the Finder adds.
    if (File(into, MANIFEST).isFile) return into
    val holding = into.listFiles().orEmpty().filter { File(it, MANIFEST).isFile }
    if (holding.size > 1) throw refused("$path holds several bundles: ${holding[0].name}, ${holding[1].name}")
    return holding.firstOrNull() ?: throw missing(path)
}

private fun missing(path: File): BundleException {
    val message = "$path is not a bundle: no $MANIFEST inside"
    return BundleException(message, "make one with evm-export --zip", "manifest.missing")
}

private fun refused(message: String, name: String = "") = BundleException(message, code = "zip.refused", where = name)

private fun check(path: File, entries: List<ZipEntry>) {
    if (entries.size > MAX_FILES) {
        throw refused("$path has ${entries.size} files; a bundle has at most $MAX_FILES")
    }
    val seen = HashSet<String>()
    for (entry in entries) {
        if (!insideBundle(entry.name)) throw refused("$path: '${entry.name}' leaves the bundle", entry.name)
        if (!seen.add(entry.name.lowercase())) throw refused("$path: ${entry.name} occurs twice", entry.name)
    }
    if (entries.sumOf { max(0, it.size) } > MAX_BYTES) {
        throw refused("$path unpacks to more than ${MAX_BYTES shr 30} GB")
    }
}

/** Writes one file and returns its size. */
private fun unpack(path: File, zip: ZipFile, entry: ZipEntry, into: File, limit: Long): Long {
    val target = File(into, entry.name)
    target.parentFile?.mkdirs()
    val most = max(SMALL, min(limit, MAX_RATIO * entry.compressedSize))
    val block = ByteArray(1 shl 16)
    var size = 0L
    zip.getInputStream(entry).use { reader ->
        target.outputStream().use { writer ->
            while (true) {
                val count = reader.read(block).takeIf { it >= 0 } ?: break
                size += count
                if (size > most) {
                    val reason = "unpacks to over $MAX_RATIO times its size: possible zip bomb"
                    throw refused("$path: ${entry.name} $reason", entry.name)
                }
                writer.write(block, 0, count)
            }
        }
    }
    return size
}
