package android.net;

public abstract class Uri {
    public abstract @org.jetbrains.annotations.Nullable String getLastPathSegment();
}
