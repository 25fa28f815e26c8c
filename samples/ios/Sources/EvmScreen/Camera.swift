// The system's camera on iOS. On a Mac the camera is not available.
// NOT COMPILED BY THIS PROJECT.
import SwiftUI

#if os(iOS)
import UIKit

@MainActor var hasCamera: Bool { UIImagePickerController.isSourceTypeAvailable(.camera) }

extension View {
    /// Shows the camera while `isPresented` is true, and calls `onPhoto` with the photo as a JPEG file with its orientation.
    func camera(isPresented: Binding<Bool>, onPhoto: @escaping @MainActor (Data) -> Void) -> some View {
        fullScreenCover(isPresented: isPresented) {
            CameraPicker(isPresented: isPresented, onPhoto: onPhoto).ignoresSafeArea()
        }
    }
}

private struct CameraPicker: UIViewControllerRepresentable {
    @Binding var isPresented: Bool
    let onPhoto: @MainActor (Data) -> Void

    func makeUIViewController(context: Context) -> UIImagePickerController {
        let picker = UIImagePickerController()
        picker.sourceType = .camera
        picker.delegate = context.coordinator
        return picker
    }

    func updateUIViewController(_ picker: UIImagePickerController, context: Context) {}

    func makeCoordinator() -> Coordinator { Coordinator(self) }

    final class Coordinator: NSObject, UIImagePickerControllerDelegate, UINavigationControllerDelegate {
        private let picker: CameraPicker

        init(_ picker: CameraPicker) { self.picker = picker }

        func imagePickerController(
            _ controller: UIImagePickerController,
            didFinishPickingMediaWithInfo info: [UIImagePickerController.InfoKey: Any]
        ) {
            picker.isPresented = false
            let photo = info[.originalImage] as? UIImage
            if let data = photo?.jpegData(compressionQuality: 0.95) { picker.onPhoto(data) }
        }

        func imagePickerControllerDidCancel(_ controller: UIImagePickerController) { picker.isPresented = false }
    }
}
#else
let hasCamera = false

extension View {
    func camera(isPresented: Binding<Bool>, onPhoto: @escaping @MainActor (Data) -> Void) -> some View { self }
}
#endif
