plugins {
    id("com.android.application") version "8.7.3"
}

android {
    namespace = "com.example.odpsample"
    // The first level whose library has android.adservices.ondevicepersonalization.
    compileSdk = 35

    defaultConfig {
        applicationId = "com.example.odpsample"
        minSdk = 35
        targetSdk = 35
        versionCode = 1
        versionName = "1.0"
    }

    compileOptions {
        sourceCompatibility = JavaVersion.VERSION_17
        targetCompatibility = JavaVersion.VERSION_17
    }

    sourceSets["main"].apply {
        manifest.srcFile("AndroidManifest.xml")
        java.setSrcDirs(listOf("java"))
        res.setSrcDirs(listOf("res"))
    }
}
