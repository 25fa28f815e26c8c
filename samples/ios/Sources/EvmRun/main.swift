// evm-run-coreml BUNDLE [image]: the command with Core ML and ImageIO.
import EvmBundle
import Foundation

#if canImport(CoreML)
let core: Open = { try CoreMLRuntime($0, function: $1) }
exit(command(Array(CommandLine.arguments.dropFirst()), open: core) { try RgbImage(contentsOf: $0) })
#else
FileHandle.standardError.write(Data("evm-run-coreml: this system has no Core ML: run it on a Mac\n".utf8))
exit(3)
#endif
