// evm-run-coreml BUNDLE [picture]: self-test, then the best classes of a picture.
// NOT COMPILED BY THIS PROJECT.
import CoreGraphics
import EvmBundle
import Foundation
import ImageIO

let arguments = CommandLine.arguments
guard arguments.count > 1 else {
    print("usage: evm-run-coreml BUNDLE [picture]")
    exit(2)
}
let bundle = try EvmBundle(folder: URL(fileURLWithPath: arguments[1]))
print("self-test: off by", try bundle.selfTest())
if arguments.count > 2,
    let source = CGImageSourceCreateWithURL(URL(fileURLWithPath: arguments[2]) as CFURL, nil),
    let picture = CGImageSourceCreateImageAtIndex(source, 0, nil)
{
    for prediction in try bundle.classify(picture) { print(prediction.score, prediction.label) }
}
