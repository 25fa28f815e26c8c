package android.view;

public class View {
    public interface OnClickListener { void onClick(View v); }
    public View(android.content.Context context) {}
    public void setContentDescription(CharSequence contentDescription) {}
    public CharSequence getContentDescription() { return null; }
    public void setEnabled(boolean enabled) {}
    public boolean isEnabled() { return false; }
    public void setFitsSystemWindows(boolean fitSystemWindows) {}
    public boolean getFitsSystemWindows() { return false; }
    public void setOnClickListener(OnClickListener l) {}
    public void setPadding(int left, int top, int right, int bottom) {}
}

public abstract class ViewGroup extends View {
    public static class LayoutParams {
        public static final int MATCH_PARENT = -1;
        public static final int WRAP_CONTENT = -2;
    }
    public static class MarginLayoutParams extends LayoutParams {}
    public ViewGroup(android.content.Context context) { super(context); }
    public void addView(View child) {}
    public void addView(View child, LayoutParams params) {}
    public void removeAllViews() {}
}

public abstract class Window {
    public static final int FEATURE_NO_TITLE = 1;
}

public class Gravity {
    public static final int CENTER_VERTICAL = 0x10;
    public static final int END = 0x800005;
}
