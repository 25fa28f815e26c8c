package evm.sample

import android.content.Context
import evm.BundleException
import evm.unpack
import java.io.File
import java.io.FileNotFoundException

private const val ASSET = "bundle.zip"

/** Unpacks the asset bundle.zip, once for each installed version, and returns its folder. Throws [BundleException]. */
fun bundleFolder(context: Context): File {
    val home = File(context.noBackupFilesDir, "bundle")
    val installed = context.packageManager.getPackageInfo(context.packageName, 0).lastUpdateTime
    val folder = File(home, installed.toString())
    if (folder.isDirectory) return folder
    home.deleteRecursively()
    val aside = File(home, "unfinished").apply { mkdirs() }
    val zip = File(home, ASSET)
    try {
        context.assets.open(ASSET).use { from -> zip.outputStream().use { from.copyTo(it) } }
    } catch (_: FileNotFoundException) {
        throw BundleException(
            "this app has no asset $ASSET",
            "export with evm-export --zip and copy the zip to app/src/main/assets/$ASSET",
        )
    }
    val whole = unpack(zip, aside).renameTo(folder) // renamed only when it is complete
    zip.delete()
    if (!whole) throw BundleException("cannot write the bundle to $folder")
    return folder
}
