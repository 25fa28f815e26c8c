package android.graphics;

import org.jetbrains.annotations.Nullable;

public final class Bitmap {
    public enum Config { ALPHA_8, RGB_565, ARGB_4444, ARGB_8888, RGBA_F16, HARDWARE, RGBA_1010102 }
    public static Bitmap createBitmap(int[] colors, int width, int height, Config config) { return null; }
    public final @Nullable Config getConfig() { return null; }
    public int getWidth() { return 0; }
    public int getHeight() { return 0; }
    public final int getRowBytes() { return 0; }
    public void copyPixelsToBuffer(java.nio.Buffer dst) {}
    public void recycle() {}
}

public class BitmapFactory {
    public static class Options {
        public Bitmap.Config inPreferredConfig;
        public boolean inPremultiplied;
        public boolean inScaled;
    }
    public static @Nullable Bitmap decodeByteArray(byte[] data, int offset, int length, Options opts) { return null; }
}

public class Typeface {
    public static final Typeface MONOSPACE = null;
}
