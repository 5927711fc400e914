package com.example.odpsample;

import android.adservices.ondevicepersonalization.DownloadCompletedInput;
import android.adservices.ondevicepersonalization.DownloadCompletedOutput;
import android.adservices.ondevicepersonalization.ExecuteInput;
import android.adservices.ondevicepersonalization.ExecuteOutput;
import android.adservices.ondevicepersonalization.FederatedComputeInput;
import android.adservices.ondevicepersonalization.FederatedComputeScheduler;
import android.adservices.ondevicepersonalization.IsolatedServiceException;
import android.adservices.ondevicepersonalization.IsolatedWorker;
import android.adservices.ondevicepersonalization.LogReader;
import android.adservices.ondevicepersonalization.RequestLogRecord;
import android.adservices.ondevicepersonalization.TrainingExampleRecord;
import android.adservices.ondevicepersonalization.TrainingExamplesInput;
import android.adservices.ondevicepersonalization.TrainingExamplesOutput;
import android.adservices.ondevicepersonalization.TrainingInterval;
import android.content.ContentValues;
import android.os.OutcomeReceiver;
import android.os.PersistableBundle;
import android.util.Log;

import java.nio.charset.StandardCharsets;
import java.time.Duration;
import java.time.Instant;
import java.util.ArrayList;

/** Keeps labelled images in the request log, trains on them, and schedules the training when the app asks for it. */
final class SampleWorker implements IsolatedWorker {
    /** The population of the task configuration on the server. */
    static final String POPULATION = "digits";

    // Keys of the app's parameters.
    static final String SCHEDULE_TRAINING = "schedule_training"; // a population
    static final String SCHEDULE_INTERVAL = "schedule_interval"; // seconds; 0 or absent: train once
    static final String CANCEL_TRAINING = "cancel_training"; // a population
    static final String IMAGES = "images"; // int[n * PIXELS], each 0 to 255
    static final String LABELS = "labels"; // int[n]

    static final int PIXELS = 28 * 28;

    private static final String TAG = "OdpSample";
    private static final int ERROR_BAD_IMAGES = 1;
    private static final String COLUMN_PIXELS = "pixels";
    private static final String COLUMN_LABEL = "label";

    private final LogReader log;
    private final FederatedComputeScheduler scheduler;

    SampleWorker(LogReader log, FederatedComputeScheduler scheduler) {
        this.log = log;
        this.scheduler = scheduler;
    }

    @Override
    public void onExecute(
            ExecuteInput input, OutcomeReceiver<ExecuteOutput, IsolatedServiceException> receiver) {
        PersistableBundle params = input.getAppParams();
        String scheduled = params.getString(SCHEDULE_TRAINING);
        if (scheduled != null && !scheduled.isEmpty()) {
            schedule(scheduled, params.getLong(SCHEDULE_INTERVAL));
        }
        String cancelled = params.getString(CANCEL_TRAINING);
        if (cancelled != null && !cancelled.isEmpty()) {
            scheduler.cancel(population(cancelled));
        }
        ExecuteOutput.Builder output = new ExecuteOutput.Builder();
        int[] images = params.getIntArray(IMAGES);
        int[] labels = params.getIntArray(LABELS);
        if (images != null && labels != null) {
            if (images.length != labels.length * PIXELS) {
                receiver.onError(new IsolatedServiceException(ERROR_BAD_IMAGES));
                return;
            }
            output.setRequestLogRecord(record(images, labels));
        }
        receiver.onResult(output.build());
    }

    @Override
    public void onTrainingExamples(
            TrainingExamplesInput input,
            OutcomeReceiver<TrainingExamplesOutput, IsolatedServiceException> receiver) {
        TrainingExamplesOutput.Builder output = new TrainingExamplesOutput.Builder();
        int count = 0;
        if (POPULATION.equals(input.getPopulationName())) {
            // All that is logged, each time. To train on what is new only, begin at input.getResumptionToken().
            for (RequestLogRecord record : log.getRequests(Instant.EPOCH, Instant.now())) {
                byte[] token = Long.toString(record.getTime().toEpochMilli()).getBytes(StandardCharsets.UTF_8);
                for (ContentValues row : record.getRows()) {
                    byte[] pixels = row.getAsByteArray(COLUMN_PIXELS);
                    Long label = row.getAsLong(COLUMN_LABEL);
                    if (pixels != null && label != null) {
                        output.addTrainingExampleRecord(
                                new TrainingExampleRecord.Builder()
                                        .setTrainingExample(example(pixels, label))
                                        .setResumptionToken(token)
                                        .build());
                        count++;
                    }
                }
            }
        }
        // Without examples the run ends here, and is counted as failed.
        Log.i(TAG, count + " examples for " + input.getPopulationName());
        receiver.onResult(output.build());
    }

    /** The other way to schedule: when the data that training needs has arrived. Needs download-settings. */
    @Override
    public void onDownloadCompleted(
            DownloadCompletedInput input,
            OutcomeReceiver<DownloadCompletedOutput, IsolatedServiceException> receiver) {
        schedule(POPULATION, Duration.ofDays(1).getSeconds());
        // What is not retained here is deleted, earlier downloads too.
        receiver.onResult(
                new DownloadCompletedOutput.Builder()
                        .setRetainedKeys(new ArrayList<>(input.getDownloadedContents().keySet()))
                        .build());
    }

    private void schedule(String population, long seconds) {
        boolean again = seconds > 0;
        TrainingInterval interval =
                new TrainingInterval.Builder()
                        .setSchedulingMode(
                                again
                                        ? TrainingInterval.SCHEDULING_MODE_RECURRENT
                                        : TrainingInterval.SCHEDULING_MODE_ONE_TIME)
                        .setMinimumInterval(Duration.ofSeconds(again ? seconds : 10))
                        .build();
        // Waits for the platform, which logs what goes wrong and tells the caller nothing.
        scheduler.schedule(new FederatedComputeScheduler.Params(interval), population(population));
        Log.i(TAG, "asked to schedule " + population);
    }

    private static FederatedComputeInput population(String name) {
        return new FederatedComputeInput.Builder().setPopulationName(name).build();
    }

    private static RequestLogRecord record(int[] images, int[] labels) {
        RequestLogRecord.Builder record = new RequestLogRecord.Builder();
        for (int i = 0; i < labels.length; i++) {
            byte[] pixels = new byte[PIXELS];
            for (int j = 0; j < PIXELS; j++) {
                pixels[j] = (byte) images[i * PIXELS + j];
            }
            ContentValues row = new ContentValues();
            row.put(COLUMN_PIXELS, pixels);
            row.put(COLUMN_LABEL, (long) labels[i]);
            record.addRow(row);
        }
        return record.build();
    }

    /** Features by the names that the model's input has on the server: x, pixels from 0 to 1, and y, the digit. */
    private static byte[] example(byte[] pixels, long label) {
        float[] x = new float[pixels.length];
        for (int i = 0; i < pixels.length; i++) {
            x[i] = (pixels[i] & 0xff) / 255f;
        }
        return new TfExample().floats("x", x).ints("y", label).toByteArray();
    }
}
