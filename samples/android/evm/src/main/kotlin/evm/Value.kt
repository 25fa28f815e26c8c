package evm

import kotlinx.serialization.json.Json
import kotlinx.serialization.json.JsonArray
import kotlinx.serialization.json.JsonElement
import kotlinx.serialization.json.JsonNull
import kotlinx.serialization.json.JsonObject
import kotlinx.serialization.json.JsonPrimitive
import kotlinx.serialization.json.booleanOrNull
import kotlinx.serialization.json.doubleOrNull
import kotlinx.serialization.json.longOrNull

private const val HUGE = 1e15 // bound of all numbers

/** An error in a manifest, with its key path. */
internal class Invalid(val where: String, what: String) : IllegalArgumentException("$where $what")

/**
 * A JSON value, null for a missing key, and its key path. The functions convert the value, and throw [Invalid] if it has
 * another type or is out of range.
 */
internal class Value(private val json: JsonElement?, val where: String = "") {
    val isAbsent get() = json == null
    val isNull get() = json == null || json is JsonNull

    fun require(good: Boolean, wanted: String) {
        if (!good) throw Invalid(where, "must be $wanted, is ${json.toString().take(60)}")
    }

    private fun obj(): JsonObject = json as? JsonObject ?: throw Invalid(where, "must be an object")

    fun at(key: String) = Value(obj()[key], if (where.isEmpty()) key else "$where.$key")

    fun members(): Map<String, Value> = obj().keys.associateWith(::at)

    fun items(least: Int = 0, most: Int = Int.MAX_VALUE): List<Value> {
        val list = json as? JsonArray
        require(list != null && list.size in least..most, "a list of $least" + if (most > least) " or more" else "")
        return list.orEmpty().mapIndexed { i, item -> Value(item, "$where[$i]") }
    }

    fun text(): String {
        require(json is JsonPrimitive && json.isString, "text")
        return (json as JsonPrimitive).content
    }

    fun oneOf(vararg choices: String): String = text().also { require(it in choices, "one of ${choices.joinToString()}") }

    fun number(least: Double = -HUGE, most: Double = HUGE): Double {
        val value = unquoted()?.doubleOrNull
        require(value != null && value in least..most, "a finite number")
        return value ?: 0.0
    }

    fun positive(most: Double = HUGE): Double = number(0.0, most).also { require(it > 0, "above 0") }

    fun count(most: Long = HUGE.toLong()): Long {
        val value = unquoted()?.longOrNull
        require(value != null && value in 1..most, "a whole number from 1")
        return value ?: 0
    }

    fun flag(otherwise: Boolean): Boolean {
        val value = if (json == null) otherwise else unquoted()?.booleanOrNull
        require(value != null, "true or false")
        return value ?: otherwise
    }

    private fun unquoted() = (json as? JsonPrimitive)?.takeIf { !it.isString }
}

/** Parses a JSON text. Throws IllegalArgumentException if the text is not JSON. */
internal fun parsedJson(text: String): JsonElement = try {
    Json.parseToJsonElement(text)
} catch (_: StackOverflowError) { // the parser overflows the stack on a file with deep nesting
    throw IllegalArgumentException("nested too deeply")
}
