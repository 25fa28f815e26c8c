// Stand-in for Apple's Core ML: the declarations that samples/ios uses, without their function.
import CoreVideo
import Foundation

public enum MLComputeUnits: Int { case cpuOnly, cpuAndGPU, all, cpuAndNeuralEngine }
public enum MLMultiArrayDataType: Int { case double, float32, float16, int32 }
public enum MLFeatureType: Int { case invalid, int64, double, string, image, multiArray, dictionary }

open class MLModelConfiguration {
    public init() {}
    open var computeUnits: MLComputeUnits { get { fatalError() } set {} }
    open var functionName: String? { get { fatalError() } set {} }
}
open class MLModelDescription {
    open var classLabels: [Any]? { fatalError() }
}
open class MLModel {
    public init(contentsOf url: URL, configuration: MLModelConfiguration) throws { fatalError() }
    open class func compileModel(at modelURL: URL) throws -> URL { fatalError() }
    open func prediction(from input: any MLFeatureProvider) throws -> any MLFeatureProvider { fatalError() }
    open var modelDescription: MLModelDescription { fatalError() }
}
public protocol MLFeatureProvider: AnyObject {
    var featureNames: Set<String> { get }
    func featureValue(for featureName: String) -> MLFeatureValue?
}
open class MLDictionaryFeatureProvider: MLFeatureProvider {
    public init(dictionary: [String: Any]) throws { fatalError() }
    public var featureNames: Set<String> { fatalError() }
    public func featureValue(for featureName: String) -> MLFeatureValue? { fatalError() }
}
open class MLFeatureValue {
    public init(pixelBuffer value: CVPixelBuffer) { fatalError() }
    public init(multiArray value: MLMultiArray) { fatalError() }
    open var type: MLFeatureType { fatalError() }
    open var multiArrayValue: MLMultiArray? { fatalError() }
    open var dictionaryValue: [AnyHashable: NSNumber] { fatalError() }
}
open class MLMultiArray {
    public init(shape: [NSNumber], dataType: MLMultiArrayDataType) throws { fatalError() }
    open var count: Int { fatalError() }
    open var shape: [NSNumber] { fatalError() }
    public subscript(index: Int) -> NSNumber { get { fatalError() } set {} }
}
