package ai.onnxruntime;

import java.nio.ByteBuffer;
import java.util.Map;

public class OrtException extends Exception {}

public enum OnnxJavaType { FLOAT, DOUBLE, INT8, INT16, INT32, INT64, BOOL, STRING, UINT8, FLOAT16, BFLOAT16, UNKNOWN }

public interface OnnxValue extends AutoCloseable {
    @Override void close();
}

public abstract class OnnxTensorLike implements OnnxValue {
    public TensorInfo getInfo() { return null; }
}

public interface ValueInfo {}

public class NodeInfo {
    public ValueInfo getInfo() { return null; }
}

public class TensorInfo implements ValueInfo {
    public final OnnxJavaType type = null;
    public long[] getShape() { return null; }
}

public class OnnxTensor extends OnnxTensorLike {
    public static OnnxTensor createTensor(OrtEnvironment env, ByteBuffer data, long[] shape, OnnxJavaType type) throws OrtException { return null; }
    public ByteBuffer getByteBuffer() { return null; }
    @Override public void close() {}
}

public class OrtEnvironment implements AutoCloseable {
    public static synchronized OrtEnvironment getEnvironment() { return null; }
    public OrtSession createSession(String modelPath, OrtSession.SessionOptions options) throws OrtException { return null; }
    @Override public synchronized void close() throws OrtException {}
}

public class OrtSession implements AutoCloseable {
    public Map<String, NodeInfo> getInputInfo() throws OrtException { return null; }
    public Map<String, NodeInfo> getOutputInfo() throws OrtException { return null; }
    public Result run(Map<String, ? extends OnnxTensorLike> inputs) throws OrtException { return null; }
    @Override public void close() throws OrtException {}

    public static class SessionOptions implements AutoCloseable {
        public void setIntraOpNumThreads(int numThreads) throws OrtException {}
        public void registerCustomOpLibrary(String path) throws OrtException {}
        @Override public void close() {}
    }

    public static class Result implements AutoCloseable, Iterable<Map.Entry<String, OnnxValue>> {
        @Override public java.util.Iterator<Map.Entry<String, OnnxValue>> iterator() { return null; }
        @Override public void close() {}
    }
}
