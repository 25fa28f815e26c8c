plugins {
    id("com.android.application") version "8.11.0" apply false
    kotlin("android") version "2.2.0" apply false
    kotlin("jvm") version "2.2.0" apply false
}
