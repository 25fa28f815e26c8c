// The sample's screen: choose or take an image, see its five most probable classes and the times, run the self-test.
// NOT COMPILED BY THIS PROJECT.
import EvmBundle
import PhotosUI
import SwiftUI

/// Screen that classifies images with a Core ML bundle.
@MainActor
public struct EvmScreen: View {
    @StateObject private var session: Session
    @State private var chosen: PhotosPickerItem?
    @State private var cameraIsOpen = false

    /// Makes the screen. `bundle`: folder of a Core ML bundle, such as one in the app's resources. If it is nil, the screen
    /// shows that the app has no bundle.
    public init(bundle: URL?) { _session = StateObject(wrappedValue: Session(bundle: bundle)) }

    public var body: some View {
        ScrollView {
            VStack(alignment: .leading, spacing: 16) {
                buttons
                if let seen = session.seen {
                    Image(decorative: seen, scale: 1).resizable().scaledToFit().frame(maxHeight: 320)
                }
                Text(session.status).font(.callout).foregroundStyle(.secondary)
                ForEach(session.predictions, id: \.index) { PredictionRow(prediction: $0) }
                ForEach(session.checks, id: \.name) { CheckRow(check: $0) }
            }
            .padding()
        }
        .onChange(of: chosen) {
            guard let item = chosen else { return }
            session.classify(named: "image") { try await item.loadTransferable(type: Data.self) }
        }
        .camera(isPresented: $cameraIsOpen) { data in session.classify(named: "photo") { data } }
    }

    private var buttons: some View {
        HStack {
            PhotosPicker("Image", selection: $chosen, matching: .images)
            if hasCamera { Button("Camera") { cameraIsOpen = true } }
            Button("Self-test") { session.selfTest() }
        }
        .buttonStyle(.bordered)
        .disabled(session.isBusy)
    }
}

private struct PredictionRow: View {
    let prediction: Prediction

    var body: some View {
        HStack {
            Text(prediction.label)
            Spacer()
            ProgressView(value: prediction.score).frame(width: 120)
            Text(prediction.score, format: .percent.precision(.fractionLength(1))).monospacedDigit()
        }
    }
}

private struct CheckRow: View {
    let check: Check

    var body: some View {
        HStack {
            Text(check.name)
            Spacer()
            Text(String(format: "%.1e of %.1e", check.error, check.limit)).monospacedDigit()
            Image(systemName: check.ok ? "checkmark.circle" : "xmark.octagon")
                .foregroundStyle(check.ok ? .green : .red)
        }
        .font(.footnote)
    }
}
