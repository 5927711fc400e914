/* Sends HTTP/1.1 requests to one server at a steady rate and measures the answers; see load.py, which compiles it.

   load HOST PORT RATE SECONDS CONNECTIONS COUNT HEAD TARGETS BODY

   RATE requests a second (0: as fast as answers come) for SECONDS or until COUNT (0: no end) are sent, over CONNECTIONS
   that are kept alive. HEAD is a file with the head of a request in which every @T becomes the next line of the file
   TARGETS (its last line is repeated) and every @N a number that no other request has. BODY is a file with the body, "-" for none.

   A request's time runs from the moment at which the rate wanted it sent, so a server that stalls is not spared the
   requests that had to wait. Prints one JSON object. */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { HEAD_LIMIT = 16384, ANSWER_LIMIT = 65536, STATUSES = 1000 };

typedef struct {
  int fd;
  int busy;
  double due;
  size_t head_size, sent;
  size_t got;
  char head[HEAD_LIMIT];
  char answer[ANSWER_LIMIT];
} Connection;

static char *body = NULL, *head_text = NULL, *targets = NULL, *next_target = NULL;
static size_t body_size = 0, head_text_size = 0, targets_size = 0;
static uint64_t number = 0;
static struct sockaddr_in address;
static long counts[STATUSES];
static long failures = 0, done = 0;
/* One bucket for every 20 microseconds up to 60 s. */
enum { BUCKETS = 3000000 };
static uint32_t *times[2];
static double longest[2];

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static char *read_file(const char *path, size_t *size) {
  FILE *file = fopen(path, "rb");
  if (!file) { perror(path); exit(2); }
  fseek(file, 0, SEEK_END);
  *size = (size_t)ftell(file);
  rewind(file);
  char *data = malloc(*size + 1);
  if (!data || fread(data, 1, *size, file) != *size) { perror(path); exit(2); }
  data[*size] = 0;
  fclose(file);
  return data;
}

static int dial(void) {
  int fd = socket(AF_INET, SOCK_STREAM, 0), yes = 1;
  if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address) < 0) { perror("connect"); exit(2); }
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
  fcntl(fd, F_SETFL, O_NONBLOCK);
  return fd;
}

static void watch(int epoll, Connection *one, int change, uint32_t events) {
  struct epoll_event event = {.events = events, .data = {.ptr = one}};
  if (epoll_ctl(epoll, change, one->fd, &event) < 0) { perror("epoll_ctl"); exit(2); }
}

static void fill(Connection *one) {
  size_t at = 0;
  number++;
  const char *target_end = targets ? strchrnul(next_target, '\n') : NULL;
  for (size_t i = 0; i < head_text_size; i++) {
    if (at + 4096 > HEAD_LIMIT) { fprintf(stderr, "the head is too long\n"); exit(2); }
    if (head_text[i] == '@' && head_text[i + 1] == 'N') {
      at += (size_t)sprintf(one->head + at, "%016llx", (unsigned long long)number);
      i++;
    } else if (head_text[i] == '@' && head_text[i + 1] == 'T' && targets) {
      size_t size = (size_t)(target_end - next_target);
      memcpy(one->head + at, next_target, size);
      at += size;
      i++;
    } else {
      one->head[at++] = head_text[i];
    }
  }
  if (targets && *target_end && target_end[1]) next_target = (char *)target_end + 1;
  one->head_size = at;
  one->sent = 0;
  one->got = 0;
}

/* Returns 0 if the socket takes no more, 1 if all is sent, -1 if the connection failed. */
static int push(Connection *one) {
  size_t total = one->head_size + body_size;
  while (one->sent < total) {
    struct iovec parts[2];
    int n = 0;
    if (one->sent < one->head_size) parts[n++] = (struct iovec){one->head + one->sent, one->head_size - one->sent};
    size_t skip = one->sent > one->head_size ? one->sent - one->head_size : 0;
    if (body_size > skip) parts[n++] = (struct iovec){body + skip, body_size - skip};
    ssize_t wrote = writev(one->fd, parts, n);
    if (wrote < 0) return errno == EAGAIN ? 0 : -1;
    one->sent += (size_t)wrote;
  }
  return 1;
}

/* Returns the status once the answer is whole, 0 before that, -1 if the connection failed. */
static int pull(Connection *one, int *closes) {
  for (;;) {
    if (one->got + 1 >= ANSWER_LIMIT) return -1;
    ssize_t read_now = read(one->fd, one->answer + one->got, ANSWER_LIMIT - 1 - one->got);
    if (read_now < 0 && errno == EAGAIN) return 0;
    if (read_now <= 0) return -1;
    one->got += (size_t)read_now;
    one->answer[one->got] = 0;
    char *end = strstr(one->answer, "\r\n\r\n");
    if (!end) continue;
    char *length = strcasestr(one->answer, "content-length:");
    size_t size = length && length < end ? strtoul(length + 15, NULL, 10) : 0;
    if (one->got < (size_t)(end + 4 - one->answer) + size) continue;
    char *close_word = strcasestr(one->answer, "connection: close");
    *closes = close_word && close_word < end;
    int status = atoi(one->answer + 9);
    return status > 0 && status < STATUSES ? status : -1;
  }
}

static double percentile(const uint32_t *buckets, double share) {
  uint64_t total = 0, seen = 0;
  for (int i = 0; i < BUCKETS; i++) total += buckets[i];
  if (!total) return 0;
  for (int i = 0; i < BUCKETS; i++) {
    seen += buckets[i];
    if ((double)seen >= share * (double)total) return (i + 1) * 20e-6;
  }
  return BUCKETS * 20e-6;
}

int main(int argc, char **argv) {
  if (argc != 10) { fprintf(stderr, "see the head of load.c\n"); return 2; }
  double rate = atof(argv[3]), seconds = atof(argv[4]);
  int connections = atoi(argv[5]);
  long count = atol(argv[6]), sent = 0;
  head_text = read_file(argv[7], &head_text_size);
  if (strcmp(argv[8], "-")) next_target = targets = read_file(argv[8], &targets_size);
  if (strcmp(argv[9], "-")) body = read_file(argv[9], &body_size);
  struct timespec clock;
  clock_gettime(CLOCK_REALTIME, &clock);
  number = (uint64_t)clock.tv_sec * 1000000000u + (uint64_t)clock.tv_nsec;
  address.sin_family = AF_INET;
  address.sin_port = htons((uint16_t)atoi(argv[2]));
  if (inet_pton(AF_INET, argv[1], &address.sin_addr) != 1) { fprintf(stderr, "no address\n"); return 2; }
  times[0] = calloc(BUCKETS, sizeof(uint32_t));
  times[1] = calloc(BUCKETS, sizeof(uint32_t));
  Connection *all = calloc((size_t)connections, sizeof *all);
  Connection **idle = calloc((size_t)connections, sizeof *idle);
  if (!times[0] || !times[1] || !all || !idle) return 2;
  int epoll = epoll_create1(0), idle_count = 0;
  for (int i = 0; i < connections; i++) {
    all[i].fd = dial();
    watch(epoll, &all[i], EPOLL_CTL_ADD, EPOLLIN);
    idle[idle_count++] = &all[i];
  }
  double start = now(), last = start;
  double first_created = 0, last_created = 0;
  struct epoll_event events[256];
  for (;;) {
    double present = now();
    int open_end = present - start < seconds && (!count || sent < count);
    /* What is due and finds a free connection goes out. */
    while (open_end && idle_count && (rate <= 0 || start + (double)sent / rate <= present)) {
      Connection *one = idle[--idle_count];
      one->due = rate > 0 ? start + (double)sent / rate : present;
      one->busy = 1;
      sent++;
      fill(one);
      int state = push(one);
      if (state == 0) watch(epoll, one, EPOLL_CTL_MOD, EPOLLIN | EPOLLOUT);
      if (count && sent >= count) open_end = 0;
    }
    if (!open_end && idle_count == connections) break;
    if (!open_end && present - last > 30 && present - start > seconds + 30) break;
    double wait = rate > 0 && idle_count && open_end ? start + (double)sent / rate - now() : 0.1;
    if (wait < 0) wait = 0;
    struct timespec patience = {(time_t)wait, (long)((wait - (double)(time_t)wait) * 1e9)};
    int ready = epoll_pwait2(epoll, events, 256, &patience, NULL);
    if (ready < 0 && errno != EINTR) { perror("epoll"); return 2; }
    for (int i = 0; i < ready; i++) {
      Connection *one = events[i].data.ptr;
      int status = 0, closes = 0;
      if (one->busy && events[i].events & EPOLLOUT) {
        int state = push(one);
        if (state < 0) status = -1;
        if (state > 0) watch(epoll, one, EPOLL_CTL_MOD, EPOLLIN);
      }
      if (!status && events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) status = pull(one, &closes);
      if (!status) continue;
      double end = now();
      if (one->busy) {
        last = end;
        done++;
        if (status > 0) {
          int created = status == 201;
          double took = end - one->due;
          int bucket = (int)(took / 20e-6);
          times[created][bucket < BUCKETS ? bucket : BUCKETS - 1]++;
          if (took > longest[created]) longest[created] = took;
          counts[status]++;
          if (created) {
            if (!first_created) first_created = one->due;
            last_created = end;
          }
        } else {
          failures++;
        }
        one->busy = 0;
        idle[idle_count++] = one;
      }
      if (status < 0 || closes) {
        close(one->fd);
        one->fd = dial();
        watch(epoll, one, EPOLL_CTL_ADD, EPOLLIN);
      }
    }
  }
  struct rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  double cpu = (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
               (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) * 1e-6;
  printf("{\"seconds\": %.3f, \"sent\": %ld, \"answered\": %ld, \"failures\": %ld, \"cpu\": %.3f, ", last - start, sent,
         done, failures, cpu);
  printf("\"created_seconds\": %.3f, \"statuses\": {", last_created - first_created);
  int any = 0;
  for (int i = 0; i < STATUSES; i++)
    if (counts[i]) printf("%s\"%d\": %ld", any++ ? ", " : "", i, counts[i]);
  printf("}");
  const char *names[2] = {"other", "created"};
  for (int i = 0; i < 2; i++)
    printf(", \"%s\": {\"p50\": %.5f, \"p90\": %.5f, \"p99\": %.5f, \"p999\": %.5f, \"longest\": %.5f}", names[i],
           percentile(times[i], .5), percentile(times[i], .9), percentile(times[i], .99), percentile(times[i], .999),
           longest[i]);
  printf("}\n");
  return 0;
}
