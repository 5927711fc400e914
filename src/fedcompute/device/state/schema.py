"""The tables of a device's file, and the steps from older versions to the present one (spec/device.md 9).

Times are Unix milliseconds. `owner` is `Owner.digest`: rows of one component under one certificate never mix with
those of another.
"""

_VERSION_1 = """
CREATE TABLE app (
  owner TEXT PRIMARY KEY,
  package TEXT NOT NULL,
  class_name TEXT NOT NULL,
  certificate_digest TEXT NOT NULL,
  code TEXT NOT NULL,
  server TEXT,
  download TEXT,
  sync_token INTEGER,
  installed INTEGER NOT NULL
);
CREATE UNIQUE INDEX app_component ON app (package, class_name);

CREATE TABLE task (
  job_id INTEGER PRIMARY KEY,
  owner TEXT NOT NULL,
  package TEXT NOT NULL,
  class_name TEXT NOT NULL,
  certificate_digest TEXT NOT NULL,
  population TEXT NOT NULL,
  server TEXT NOT NULL,
  recurrent INTEGER NOT NULL,
  minimum_interval INTEGER NOT NULL,
  created INTEGER NOT NULL,
  last_scheduled INTEGER NOT NULL,
  last_run_start INTEGER NOT NULL DEFAULT 0,
  last_run_end INTEGER NOT NULL DEFAULT 0,
  earliest_run INTEGER NOT NULL,
  scheduling_reason INTEGER NOT NULL,
  reschedule_count INTEGER NOT NULL DEFAULT 0,
  pending INTEGER NOT NULL DEFAULT 1,
  forced INTEGER NOT NULL DEFAULT 0,
  UNIQUE (owner, population)
);
CREATE INDEX task_due ON task (pending, earliest_run);
CREATE INDEX task_package ON task (package);

CREATE TABLE background_job (
  name TEXT PRIMARY KEY,
  earliest_run INTEGER NOT NULL,
  last_run_start INTEGER NOT NULL DEFAULT 0,
  last_run_end INTEGER NOT NULL DEFAULT 0
);

CREATE TABLE registration (
  owner TEXT NOT NULL,
  population TEXT NOT NULL,
  job_id INTEGER NOT NULL,
  PRIMARY KEY (owner, population)
);
CREATE TABLE resumption (
  job_id INTEGER NOT NULL,
  task_identifier TEXT NOT NULL,
  token BLOB NOT NULL,
  PRIMARY KEY (job_id, task_identifier)
);
CREATE TABLE task_history (
  id INTEGER PRIMARY KEY,
  job_id INTEGER NOT NULL,
  population TEXT NOT NULL,
  task_id TEXT NOT NULL,
  contribution_time INTEGER NOT NULL,
  contribution_round INTEGER NOT NULL,
  total_participation INTEGER NOT NULL
);
CREATE INDEX task_history_newest ON task_history (job_id, population, task_id, contribution_time);

CREATE TABLE authorization_token (
  server TEXT NOT NULL,
  owner_id TEXT NOT NULL,
  token TEXT NOT NULL,
  expires INTEGER NOT NULL,
  PRIMARY KEY (server, owner_id)
);
CREATE TABLE encryption_key (
  url TEXT NOT NULL,
  key_id TEXT NOT NULL,
  public_key BLOB NOT NULL,
  expires INTEGER NOT NULL,
  PRIMARY KEY (url, key_id)
);

CREATE TABLE remote_data (owner TEXT NOT NULL, key TEXT NOT NULL, value BLOB NOT NULL, PRIMARY KEY (owner, key));
CREATE TABLE local_data (owner TEXT NOT NULL, key TEXT NOT NULL, value BLOB NOT NULL, PRIMARY KEY (owner, key));

CREATE TABLE request_log (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  owner TEXT NOT NULL,
  app_package TEXT NOT NULL,
  time INTEGER NOT NULL,
  row_count INTEGER NOT NULL,
  rows BLOB NOT NULL
);
CREATE INDEX request_log_time ON request_log (owner, time);
CREATE TABLE event_log (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  request_id INTEGER NOT NULL REFERENCES request_log (id) ON DELETE CASCADE,
  owner TEXT NOT NULL,
  row_index INTEGER NOT NULL,
  type INTEGER NOT NULL,
  time INTEGER NOT NULL,
  data BLOB NOT NULL
);
CREATE INDEX event_log_time ON event_log (owner, time);
CREATE INDEX event_log_request ON event_log (request_id);

CREATE TABLE error_count (
  owner TEXT NOT NULL,
  code INTEGER NOT NULL,
  day INTEGER NOT NULL,
  count INTEGER NOT NULL,
  PRIMARY KEY (owner, code, day)
);

CREATE TABLE setting (name TEXT PRIMARY KEY, value BLOB NOT NULL);

CREATE TABLE device_log (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  time INTEGER NOT NULL,
  owner TEXT,
  subject TEXT NOT NULL,
  outcome TEXT NOT NULL,
  detail TEXT NOT NULL,
  output TEXT NOT NULL DEFAULT ''
);
CREATE INDEX device_log_time ON device_log (time);
"""

MIGRATIONS = (_VERSION_1,)
"""Script `i` leads from version `i` to `i + 1`; the file's version is SQLite's `user_version`."""
