package com.example.odpsample;

import android.adservices.ondevicepersonalization.IsolatedService;
import android.adservices.ondevicepersonalization.IsolatedWorker;
import android.adservices.ondevicepersonalization.RequestToken;

/** What the platform binds to: makes one worker for each request, with what that request grants. */
public final class SampleService extends IsolatedService {
    @Override
    public IsolatedWorker onRequest(RequestToken token) {
        return new SampleWorker(getLogReader(token), getFederatedComputeScheduler(token));
    }
}
