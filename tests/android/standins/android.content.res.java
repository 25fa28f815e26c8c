package android.content.res;

public final class AssetManager {
    public java.io.InputStream open(String fileName) throws java.io.IOException { return null; }
}

public class Resources {
    public android.util.DisplayMetrics getDisplayMetrics() { return null; }
}
