package androidx.activity.result

import androidx.activity.result.contract.ActivityResultContracts.PickVisualMedia.VisualMediaType

fun interface ActivityResultCallback<O> {
    fun onActivityResult(result: O)
}

abstract class ActivityResultLauncher<I> {
    open fun launch(input: I): Unit = TODO()
}

class PickVisualMediaRequest internal constructor() {
    class Builder {
        @Suppress("UNUSED_PARAMETER")
        fun setMediaType(mediaType: VisualMediaType): Builder = this

        fun build() = PickVisualMediaRequest()
    }
}
