package android.widget;

import android.content.Context;
import android.graphics.Bitmap;
import android.graphics.Typeface;
import android.view.View;
import android.view.ViewGroup;

public class TextView extends View {
    public TextView(Context context) { super(context); }
    public final void setText(CharSequence text) {}
    public CharSequence getText() { return null; }
    public void setGravity(int gravity) {}
    public int getGravity() { return 0; }
    public void setTypeface(Typeface tf) {}
    public Typeface getTypeface() { return null; }
}

public class Button extends TextView {
    public Button(Context context) { super(context); }
}

public class ImageView extends View {
    public ImageView(Context context) { super(context); }
    public void setAdjustViewBounds(boolean adjustViewBounds) {}
    public boolean getAdjustViewBounds() { return false; }
    public void setMaxHeight(int maxHeight) {}
    public int getMaxHeight() { return 0; }
    public void setImageBitmap(Bitmap bm) {}
}

public class ProgressBar extends View {
    public ProgressBar(Context context, android.util.AttributeSet attrs, int defStyleAttr) { super(context); }
    public synchronized void setMax(int max) {}
    public synchronized int getMax() { return 0; }
    public synchronized void setProgress(int progress) {}
    public synchronized int getProgress() { return 0; }
}

public class FrameLayout extends ViewGroup {
    public FrameLayout(Context context) { super(context); }
}

public class ScrollView extends FrameLayout {
    public ScrollView(Context context) { super(context); }
}

public class LinearLayout extends ViewGroup {
    public static final int VERTICAL = 1;
    public static class LayoutParams extends ViewGroup.MarginLayoutParams {
        public LayoutParams(int width, int height) {}
        public LayoutParams(int width, int height, float weight) {}
    }
    public LinearLayout(Context context) { super(context); }
    public void setOrientation(int orientation) {}
    public int getOrientation() { return 0; }
    public void setGravity(int gravity) {}
    public int getGravity() { return 0; }
}
