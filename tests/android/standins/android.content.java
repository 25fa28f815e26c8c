package android.content;

import org.jetbrains.annotations.Nullable;

public abstract class Context {
    public android.content.res.AssetManager getAssets() { return null; }
    public java.io.File getCacheDir() { return null; }
    public ContentResolver getContentResolver() { return null; }
    public java.io.File getNoBackupFilesDir() { return null; }
    public android.content.pm.PackageManager getPackageManager() { return null; }
    public String getPackageName() { return null; }
    public android.content.res.Resources getResources() { return null; }
}

public abstract class ContentResolver {
    public final @Nullable java.io.InputStream openInputStream(android.net.Uri uri) throws java.io.FileNotFoundException { return null; }
}

public class ActivityNotFoundException extends RuntimeException {}
