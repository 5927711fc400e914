package com.example.odpsample;

import android.adservices.ondevicepersonalization.OnDevicePersonalizationManager;
import android.adservices.ondevicepersonalization.OnDevicePersonalizationManager.ExecuteResult;
import android.app.Activity;
import android.content.ComponentName;
import android.graphics.Bitmap;
import android.graphics.Canvas;
import android.graphics.Color;
import android.graphics.Paint;
import android.os.Bundle;
import android.os.OutcomeReceiver;
import android.os.PersistableBundle;
import android.widget.Button;
import android.widget.LinearLayout;
import android.widget.TextView;

import java.util.Random;

/** Four buttons: give the service images to learn from, train once, train again and again, stop. */
public final class MainActivity extends Activity {
    private static final int SIDE = 28;
    private static final long MINUTES_15 = 15 * 60;

    private final Random random = new Random();
    private TextView status;

    @Override
    protected void onCreate(Bundle state) {
        super.onCreate(state);
        LinearLayout page = new LinearLayout(this);
        page.setOrientation(LinearLayout.VERTICAL);
        addButton(page, "Log ten digits", this::tenDigits);
        addButton(page, "Train once", () -> training(0));
        addButton(page, "Train every 15 minutes", () -> training(MINUTES_15));
        addButton(page, "Cancel training", MainActivity::cancelling);
        status = new TextView(this);
        page.addView(status);
        setContentView(page);
    }

    private interface Params {
        PersistableBundle make();
    }

    private void addButton(LinearLayout page, String text, Params params) {
        Button button = new Button(this);
        button.setText(text);
        button.setOnClickListener(view -> execute(text, params.make()));
        page.addView(button);
    }

    private void execute(String what, PersistableBundle params) {
        OnDevicePersonalizationManager manager = getSystemService(OnDevicePersonalizationManager.class);
        if (manager == null) {
            status.setText("This phone has no On-Device Personalization.");
            return;
        }
        OutcomeReceiver<ExecuteResult, Exception> receiver =
                new OutcomeReceiver<>() {
                    @Override
                    public void onResult(ExecuteResult result) {
                        status.setText(what + ": done");
                    }

                    @Override
                    public void onError(Exception error) {
                        status.setText(what + ": " + error);
                    }
                };
        manager.execute(new ComponentName(this, SampleService.class), params, getMainExecutor(), receiver);
    }

    private static PersistableBundle training(long seconds) {
        PersistableBundle params = new PersistableBundle();
        params.putString(SampleWorker.SCHEDULE_TRAINING, SampleWorker.POPULATION);
        params.putLong(SampleWorker.SCHEDULE_INTERVAL, seconds);
        return params;
    }

    private static PersistableBundle cancelling() {
        PersistableBundle params = new PersistableBundle();
        params.putString(SampleWorker.CANCEL_TRAINING, SampleWorker.POPULATION);
        return params;
    }

    /** The digits 0 to 9 in the phone's own font, each a little different every time. */
    private PersistableBundle tenDigits() {
        int[] images = new int[10 * SampleWorker.PIXELS];
        int[] labels = new int[10];
        for (int digit = 0; digit < 10; digit++) {
            Bitmap bitmap = Bitmap.createBitmap(SIDE, SIDE, Bitmap.Config.ARGB_8888);
            Canvas canvas = new Canvas(bitmap);
            canvas.drawColor(Color.BLACK);
            Paint paint = new Paint(Paint.ANTI_ALIAS_FLAG);
            paint.setColor(Color.WHITE);
            paint.setTextSize(20 + random.nextInt(6));
            canvas.drawText(String.valueOf(digit), 6 + random.nextInt(5), 21 + random.nextInt(4), paint);
            int start = digit * SampleWorker.PIXELS;
            bitmap.getPixels(images, start, SIDE, 0, 0, SIDE, SIDE);
            for (int i = start; i < start + SampleWorker.PIXELS; i++) {
                images[i] &= 0xff; // grey: any of the three colours
            }
            labels[digit] = digit;
        }
        PersistableBundle params = new PersistableBundle();
        params.putIntArray(SampleWorker.IMAGES, images);
        params.putIntArray(SampleWorker.LABELS, labels);
        return params;
    }
}
