plugins {
    id("com.android.application")
    kotlin("android")
}

android {
    namespace = "evm.sample"
    compileSdk = 36

    defaultConfig {
        applicationId = "evm.sample"
        minSdk = 29
        targetSdk = 36
        versionCode = 1
        versionName = "1"
        ndk { abiFilters += listOf("arm64-v8a", "x86_64") }
    }

    androidResources { noCompress += "zip" }
}

kotlin {
    jvmToolchain(17)
}

dependencies {
    implementation(project(":evm"))
    implementation("androidx.activity:activity:1.10.1")
    implementation("androidx.core:core:1.16.0")
    implementation("com.microsoft.onnxruntime:onnxruntime-android:1.22.0")
}
