package android.os;

public final class Bundle {}

public class Build {
    public static final String[] SUPPORTED_ABIS = {};
}
