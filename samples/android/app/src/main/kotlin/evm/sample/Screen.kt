package evm.sample

import android.app.Activity
import android.graphics.Bitmap
import android.graphics.Typeface
import android.view.Gravity
import android.view.View
import android.view.ViewGroup.LayoutParams.MATCH_PARENT
import android.view.ViewGroup.LayoutParams.WRAP_CONTENT
import android.widget.Button
import android.widget.ImageView
import android.widget.LinearLayout
import android.widget.ProgressBar
import android.widget.ScrollView
import android.widget.TextView
import evm.Check
import evm.EvmException
import evm.Prediction

/** Result of a classification: [seen], the pixels that the model read, the classes, and the times in milliseconds. */
class Found(val seen: Bitmap, val predictions: List<Prediction>, val preprocessingMs: Double, val inferenceMs: Double)

/** The user interface: an image, three buttons and the results. Use it on the main thread only. */
class Screen(private val activity: Activity, onChoose: () -> Unit, onCamera: () -> Unit, onSelfTest: () -> Unit) {
    private val image = ImageView(activity).apply {
        adjustViewBounds = true
        maxHeight = px(320)
        contentDescription = "the image"
    }
    private val buttons =
        listOf(button("Image", onChoose), button("Camera", onCamera), button("Self-test", onSelfTest))
    private val status = TextView(activity).apply { setPadding(0, px(12), 0, px(12)) }
    private val results = column()

    val view: View = ScrollView(activity).apply {
        fitsSystemWindows = true
        addView(column().apply {
            setPadding(px(16), px(16), px(16), px(16))
            addView(row().apply { buttons.forEach { addView(it, LinearLayout.LayoutParams(0, WRAP_CONTENT, 1f)) } })
            addView(image, LinearLayout.LayoutParams(MATCH_PARENT, WRAP_CONTENT))
            addView(status)
            addView(results)
        })
    }

    /** Shows what is being done and disables the buttons. */
    fun busy(doing: String) {
        buttons.forEach { it.isEnabled = false }
        status.text = doing
    }

    /** Shows an error and enables the buttons. */
    fun failed(error: EvmException) = show(error.toString())

    /** Shows a text and enables the buttons. */
    fun ready(text: String) = show(text)

    /** Shows the classes of an image. */
    fun found(found: Found) {
        show("preprocessing %.1f ms   inference %.1f ms".format(found.preprocessingMs, found.inferenceMs))
        image.setImageBitmap(found.seen)
        for (prediction in found.predictions) {
            val percent = "%.1f %%".format(100 * prediction.score)
            val bar = ProgressBar(activity, null, android.R.attr.progressBarStyleHorizontal)
            bar.max = 1000
            bar.progress = (1000 * prediction.score).toInt()
            results.addView(row().apply {
                addView(text(prediction.label), LinearLayout.LayoutParams(0, WRAP_CONTENT, 2f))
                addView(bar, LinearLayout.LayoutParams(0, WRAP_CONTENT, 2f))
                addView(text(percent).apply { gravity = Gravity.END }, LinearLayout.LayoutParams(0, WRAP_CONTENT, 1f))
            })
        }
    }

    /** Shows the checks of the self-test. */
    fun tested(checks: List<Check>, timing: String) {
        show((if (checks.all { it.ok }) "PASSED" else "FAILED") + "   " + timing)
        for (check in checks) {
            val verdict = if (check.ok) "ok" else "FAILED"
            val line = "${check.name}\n    %.1e  limit %.1e  $verdict".format(check.error, check.limit)
            results.addView(text(line).apply { typeface = Typeface.MONOSPACE })
        }
    }

    private fun show(text: String) {
        buttons.forEach { it.isEnabled = true }
        status.text = text
        results.removeAllViews()
    }

    private fun button(label: String, onClick: () -> Unit) = Button(activity).apply {
        text = label
        setOnClickListener { onClick() }
    }

    private fun text(content: String) = TextView(activity).apply {
        text = content
        setPadding(0, px(4), 0, px(4))
    }

    private fun column() = LinearLayout(activity).apply { orientation = LinearLayout.VERTICAL }

    private fun row() = LinearLayout(activity).apply { gravity = Gravity.CENTER_VERTICAL }

    private fun px(dp: Int) = (dp * activity.resources.displayMetrics.density).toInt()
}
