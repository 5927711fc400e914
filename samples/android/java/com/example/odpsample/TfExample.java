package com.example.odpsample;

import java.io.ByteArrayOutputStream;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.charset.StandardCharsets;

/**
 * Writes a serialized tf.train.Example, which saves the app a protobuf library.
 *
 * <p>Example: 1 features. Features: 1 map of name to feature. Feature: 1 bytes, 2 floats, 3 integers. Each of the three
 * lists has its values in field 1.
 */
final class TfExample {
    private static final int BYTES = 1;
    private static final int FLOATS = 2;
    private static final int INTS = 3;

    private final ByteArrayOutputStream features = new ByteArrayOutputStream();

    TfExample bytes(String name, byte[]... values) {
        ByteArrayOutputStream list = new ByteArrayOutputStream();
        for (byte[] value : values) {
            field(list, 1, value);
        }
        return feature(name, BYTES, list.toByteArray());
    }

    TfExample floats(String name, float... values) {
        ByteBuffer packed = ByteBuffer.allocate(4 * values.length).order(ByteOrder.LITTLE_ENDIAN);
        for (float value : values) {
            packed.putFloat(value);
        }
        return feature(name, FLOATS, field(1, packed.array()));
    }

    TfExample ints(String name, long... values) {
        ByteArrayOutputStream packed = new ByteArrayOutputStream();
        for (long value : values) {
            varint(packed, value);
        }
        return feature(name, INTS, field(1, packed.toByteArray()));
    }

    byte[] toByteArray() {
        return field(1, features.toByteArray());
    }

    private TfExample feature(String name, int kind, byte[] list) {
        ByteArrayOutputStream entry = new ByteArrayOutputStream();
        field(entry, 1, name.getBytes(StandardCharsets.UTF_8));
        field(entry, 2, field(kind, list));
        field(features, 1, entry.toByteArray());
        return this;
    }

    private static byte[] field(int number, byte[] content) {
        ByteArrayOutputStream out = new ByteArrayOutputStream();
        field(out, number, content);
        return out.toByteArray();
    }

    private static void field(ByteArrayOutputStream out, int number, byte[] content) {
        out.write(number << 3 | 2); // length-delimited
        varint(out, content.length);
        out.write(content, 0, content.length);
    }

    private static void varint(ByteArrayOutputStream out, long value) {
        for (; (value & ~0x7fL) != 0; value >>>= 7) {
            out.write((int) (value & 0x7f | 0x80));
        }
        out.write((int) value);
    }
}
