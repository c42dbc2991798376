/*
 * One TCP connection that is full in both directions, and says whether a single byte came wrong.
 *
 *   stream listen  ADDRESS PORT KEY
 *   stream connect ADDRESS PORT KEY
 *
 * Both ends send an endless pattern that depends on KEY, on who sends and on the place in the stream, and compare what
 * they receive with what the other must have sent. SIGTERM at one end ends the stream: it stops sending, the other end sees
 * the end of the stream and stops too, and each reads what is still under way.
 *
 * Standard output, a line each:
 *   listening | connected                   ready for the other end | the stream begins
 *   progress RECEIVED                       each time another 256 KiB have come
 *   done sent=N sum=HEX received=N sum=HEX retransmits=N
 * Exit status: 0 when both directions ended well, 1 when a byte was wrong, 2 when the connection was lost or not made.
 *
 * Linked statically: it runs in the guest, which has no libraries, and on the host.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <inttypes.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { CHUNK = 65536, PROGRESS = 256 * 1024, CONNECT_TRIES = 5 };

static volatile sig_atomic_t stop;

static void on_term(int signal_number)
{
	(void)signal_number;
	stop = 1;
}

static void lost(const char *what)
{
	printf("lost: %s: %s\n", what, strerror(errno));
	exit(2);
}

struct direction {
	uint64_t key;			/* what the pattern depends on, besides the place */
	uint64_t bytes;			/* passed so far; also the place of the next byte */
	uint64_t sum;			/* FNV-1a over all of them */
};

static uint64_t word_at(uint64_t key, uint64_t index)
{
	uint64_t value = key + index * UINT64_C(0x9e3779b97f4a7c15);

	value = (value ^ (value >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
	value = (value ^ (value >> 27)) * UINT64_C(0x94d049bb133111eb);
	return value ^ (value >> 31);
}

/* Write the pattern from the place `at` on into `out`. */
static void fill(const struct direction *direction, uint64_t at, uint8_t *out, size_t length)
{
	for (size_t i = 0; i < length;) {
		uint64_t word = word_at(direction->key, (at + i) / 8);
		size_t shift = (at + i) % 8;

		for (; shift < 8 && i < length; shift++, i++)
			out[i] = (uint8_t)(word >> (8 * shift));
	}
}

static void account(struct direction *direction, const uint8_t *data, size_t length)
{
	for (size_t i = 0; i < length; i++)
		direction->sum = (direction->sum ^ data[i]) * UINT64_C(0x100000001b3);
	direction->bytes += length;
}

static int make_connection(int listens, const char *address, uint16_t port)
{
	struct sockaddr_in name = { .sin_family = AF_INET, .sin_port = htons(port) };
	int yes = 1;

	if (inet_pton(AF_INET, address, &name.sin_addr) != 1) {
		errno = EINVAL;
		lost("address");
	}
	for (int attempt = 1;; attempt++) {
		int sock = socket(AF_INET, SOCK_STREAM, 0);

		if (sock < 0)
			lost("socket");
		if (listens) {
			setsockopt(sock, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes));
			if (bind(sock, (struct sockaddr *)&name, sizeof(name)) < 0 || listen(sock, 1) < 0)
				lost("listen");
			printf("listening\n");
			int accepted = accept(sock, NULL, NULL);

			if (accepted < 0)
				lost("accept");
			close(sock);
			return accepted;
		}
		if (connect(sock, (struct sockaddr *)&name, sizeof(name)) == 0)
			return sock;
		if (attempt == CONNECT_TRIES)
			lost("connect");
		close(sock);
	}
}

int main(int argc, char **argv)
{
	static uint8_t out[CHUNK], in[CHUNK], wanted[CHUNK];
	struct sigaction action = { .sa_handler = on_term };
	struct tcp_info info = { 0 };
	socklen_t info_size = sizeof(info);
	size_t pending = 0;		/* bytes at the end of `out` that are not sent yet */
	uint64_t told = 0;
	int writing = 1, reading = 1;

	setvbuf(stdout, NULL, _IOLBF, 0);
	if (argc != 5 || (strcmp(argv[1], "listen") && strcmp(argv[1], "connect"))) {
		fprintf(stderr, "usage: stream listen|connect ADDRESS PORT KEY\n");
		return 64;
	}
	int listens = !strcmp(argv[1], "listen");
	uint64_t key = strtoull(argv[4], NULL, 0) << 1;
	struct direction sent = { .key = key + (uint64_t)listens, .sum = UINT64_C(0xcbf29ce484222325) };
	struct direction received = { .key = key + (uint64_t)!listens, .sum = UINT64_C(0xcbf29ce484222325) };

	signal(SIGPIPE, SIG_IGN);
	int sock = make_connection(listens, argv[2], (uint16_t)atoi(argv[3]));

	sigaction(SIGTERM, &action, NULL);
	printf("connected\n");
	while (writing || reading) {
		struct pollfd ready = { .fd = sock, .events = (short)((writing ? POLLOUT : 0) | (reading ? POLLIN : 0)) };

		if (writing && stop && !pending) {
			if (shutdown(sock, SHUT_WR) < 0)
				lost("shutdown");
			writing = 0;
			continue;
		}
		if (poll(&ready, 1, -1) < 0) {
			if (errno == EINTR)
				continue;
			lost("poll");
		}
		if (reading && (ready.revents & (POLLIN | POLLHUP | POLLERR))) {
			ssize_t got = recv(sock, in, sizeof(in), MSG_DONTWAIT);

			if (got < 0 && errno != EAGAIN && errno != EINTR)
				lost("recv");
			if (got == 0) {
				reading = 0;
				stop = 1;
			} else if (got > 0) {
				fill(&received, received.bytes, wanted, (size_t)got);
				if (memcmp(in, wanted, (size_t)got)) {
					printf("corrupt: within %zd bytes from %" PRIu64 "\n", got, received.bytes);
					return 1;
				}
				account(&received, in, (size_t)got);
				if (received.bytes / PROGRESS != told) {
					told = received.bytes / PROGRESS;
					printf("progress %" PRIu64 "\n", received.bytes);
				}
			}
		}
		if (writing && (ready.revents & (POLLOUT | POLLERR))) {
			if (!pending) {
				fill(&sent, sent.bytes, out, sizeof(out));
				pending = sizeof(out);
			}
			uint8_t *next = out + sizeof(out) - pending;
			ssize_t put = send(sock, next, pending, MSG_DONTWAIT);

			if (put < 0 && errno != EAGAIN && errno != EINTR)
				lost("send");
			if (put > 0) {
				account(&sent, next, (size_t)put);
				pending -= (size_t)put;
			}
		}
	}
	if (getsockopt(sock, IPPROTO_TCP, TCP_INFO, &info, &info_size) < 0)
		lost("getsockopt");
	printf("done sent=%" PRIu64 " sum=%016" PRIx64 " received=%" PRIu64 " sum=%016" PRIx64 " retransmits=%u\n",
	       sent.bytes, sent.sum, received.bytes, received.sum, info.tcpi_total_retrans);
	return 0;
}
