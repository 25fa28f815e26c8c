// swift-tools-version:5.9
// NOT COMPILED BY THIS PROJECT: it has no Mac. See README.md.
import PackageDescription

let package = Package(
    name: "EvmRun",
    platforms: [.macOS(.v14), .iOS(.v17)],
    products: [.library(name: "EvmBundle", targets: ["EvmBundle"]), .executable(name: "evm-run-coreml", targets: ["EvmRun"])],
    targets: [.target(name: "EvmBundle"), .executableTarget(name: "EvmRun", dependencies: ["EvmBundle"])]
)
