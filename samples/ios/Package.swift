// swift-tools-version:5.9
// NOT COMPILED BY THIS PROJECT: it has no Mac. See README.md.
import PackageDescription

let package = Package(
    name: "Evm",
    platforms: [.macOS(.v14), .iOS(.v17)],
    products: [
        .library(name: "EvmBundle", targets: ["EvmBundle"]),
        .library(name: "EvmScreen", targets: ["EvmScreen"]),
        .executable(name: "evm-run-coreml", targets: ["EvmRun"]),
    ],
    targets: [
        .target(name: "EvmBundle"),
        .target(name: "EvmScreen", dependencies: ["EvmBundle"]),
        .executableTarget(name: "EvmRun", dependencies: ["EvmBundle"]),
        .testTarget(name: "EvmBundleTests", dependencies: ["EvmBundle"]),
    ]
)
