/** Library that runs bundles of evm-deploy in a browser. To use it in an app, copy this folder; it needs only onnxruntime-web and @bufbuild/protobuf. */

export type { Latency } from "./bench";
export { Bundle } from "./bundle";
export { decode, pixelsOf } from "./decode";
export { detectionsOf, type Detection, type Selection } from "./detections";
export { BundleError, EvmError, ImageError, ToolchainError, UsageError } from "./errors";
export { Geometry, labelMapOf, type Box, type LabelMap } from "./geometry";
export { SCANS, type Lowering } from "./lowering";
export { Manifest } from "./manifest";
export { Model, type ModelOptions, type Prediction } from "./model";
export { Preprocessing, type RgbImage, type PreprocessingFacts } from "./preprocess";
export { PROVIDERS, type Choice, type Provider } from "./provider";
export type { Check } from "./selftest";
export { folderAt, folderOf, zipped, type Source } from "./source";
export type { Tensor, Tensors, TensorSpec } from "./tensor";
