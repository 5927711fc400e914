package com.example.odpsample;

import java.util.Base64;

/** Prints the Base64 of an example with every kind of feature, each with values at the bounds of its kind. */
final class TfExampleBytes {
    public static void main(String[] arguments) {
        float[] pixels = new float[784];
        for (int i = 0; i < pixels.length; i++) {
            pixels[i] = i / 783f;
        }
        byte[] example =
                new TfExample()
                        .floats("x", pixels)
                        .floats("floats", -0f, Float.MIN_VALUE, Float.MAX_VALUE, Float.NEGATIVE_INFINITY)
                        .ints("y", 7)
                        .ints("ints", 0, 127, 128, -1, Long.MIN_VALUE, Long.MAX_VALUE)
                        .ints("none")
                        .bytes("bytes", new byte[0], new byte[] {0, -1}, "text".getBytes())
                        .toByteArray();
        System.out.println(Base64.getEncoder().encodeToString(example));
    }
}
