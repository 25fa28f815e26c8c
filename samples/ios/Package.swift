// swift-tools-version:5.9
// EvmBundle, EvmRun and the tests compile and run on Linux too, where a stand-in takes the place of Core ML. See README.md.
import PackageDescription

let package = Package(
    name: "Evm",
    platforms: [.macOS(.v14), .iOS(.v17)],
    products: [
        .library(name: "EvmBundle", targets: ["EvmBundle"]),
        .executable(name: "evm-run-coreml", targets: ["EvmRun"]),
    ],
    targets: [
        .target(name: "EvmBundle"),
        .executableTarget(name: "EvmRun", dependencies: ["EvmBundle"]),
        .testTarget(name: "EvmBundleTests", dependencies: ["EvmBundle", "EvmRun"]),
    ]
)

#if canImport(SwiftUI)
package.products.append(.library(name: "EvmScreen", targets: ["EvmScreen"]))
package.targets.append(.target(name: "EvmScreen", dependencies: ["EvmBundle"]))
#endif
