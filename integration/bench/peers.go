package main

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"github.com/preroute/preroute/integration/measure"
)

// What the first byte of a connection asks the server for.
const (
	askEcho = 'e' // send every byte back
	askSink = 's' // swallow all, answer with a byte at the end
)

// takeSocket turns a listener into a plain blocking socket.
func takeSocket(ln net.Listener) (int, error) {
	defer ln.Close()
	f, err := ln.(*net.TCPListener).File()
	if err != nil {
		return -1, err
	}
	defer f.Close()
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0) // Fd also makes it blocking
	if err != nil {
		return -1, fmt.Errorf("duplicating the socket: %w", err)
	}
	return fd, nil
}

// serve takes one connection after the other, as the client makes them, until
// the socket is shut down.
func serve(fd int) {
	runtime.LockOSThread() // never unlocked: the thread is pinned
	pin()
	defer unix.Close(fd)
	b := make([]byte, 256<<10)
	for {
		c, _, err := unix.Accept(fd)
		if err != nil {
			return
		}
		n, err := unix.Read(c, b[:1])
		sink := n == 1 && b[0] == askSink
		for !sink && err == nil && n == 1 {
			if _, err = unix.Write(c, b[:n]); err == nil {
				n, err = unix.Read(c, b[:1])
			}
		}
		for sink && err == nil && n > 0 {
			n, err = unix.Read(c, b)
		}
		if sink {
			_, _ = unix.Write(c, b[:1]) // the client counts until it has this
		}
		unix.Close(c)
	}
}

// pin puts the calling thread on the first CPU that it may use, as both client
// and server are: spread over several, a figure says more about who was woken
// where than about the work that a redirect makes.
func pin() {
	var may, first unix.CPUSet
	if unix.SchedGetaffinity(0, &may) != nil {
		return
	}
	for cpu := range 1024 {
		if may.IsSet(cpu) {
			first.Set(cpu)
			_ = unix.SchedSetaffinity(0, &first) // without it the figures only scatter more
			return
		}
	}
}

const (
	connections = 500
	requests    = 1000
	volume      = 64 << 20
)

// measure dials with plain blocking system calls: the client adds little of
// its own.
func (l *link) measure(w way) (f figures, err error) {
	to := netip.MustParseAddrPort(w.direct)
	if l.redirected {
		to = netip.MustParseAddrPort(w.target)
	}
	err = w.client(l).As(1000, func() error {
		pin()
		if f.perSecond, f.connected, err = newConnections(to); err != nil {
			return err
		}
		if f.request, err = requestsOnOne(to); err != nil {
			return err
		}
		f.throughput, err = send(to)
		return err
	})
	return f, err
}

func newConnections(to netip.AddrPort) (perSecond float64, p50 time.Duration, err error) {
	took := make([]time.Duration, connections)
	begun := time.Now()
	for i := range took {
		start := time.Now()
		fd, err := connect(to)
		if err != nil {
			return 0, 0, err
		}
		err = request(fd)
		took[i] = time.Since(start)
		unix.Close(fd)
		if err != nil {
			return 0, 0, err
		}
	}
	return connections / time.Since(begun).Seconds(), measure.Median(took), nil
}

func requestsOnOne(to netip.AddrPort) (p50 time.Duration, err error) {
	fd, err := connect(to)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	took := make([]time.Duration, requests)
	for i := range took {
		start := time.Now()
		if err := request(fd); err != nil {
			return 0, err
		}
		took[i] = time.Since(start)
	}
	return measure.Median(took), nil
}

func send(to netip.AddrPort) (bytesPerSecond float64, err error) {
	fd, err := connect(to)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	b := make([]byte, 128<<10)
	b[0] = askSink
	start := time.Now()
	for sent := 0; sent < volume; {
		n, err := unix.Write(fd, b)
		if err != nil {
			return 0, fmt.Errorf("sending: %w", err)
		}
		sent += n
	}
	if err := unix.Shutdown(fd, unix.SHUT_WR); err != nil {
		return 0, err
	}
	if n, err := unix.Read(fd, b[:1]); n != 1 {
		return 0, fmt.Errorf("the server did not take it all: %v", err)
	}
	return volume / time.Since(start).Seconds(), nil
}

func connect(to netip.AddrPort) (int, error) {
	family, sa := unix.AF_INET, unix.Sockaddr(&unix.SockaddrInet4{Port: int(to.Port())})
	if to.Addr().Is4() {
		sa.(*unix.SockaddrInet4).Addr = to.Addr().As4()
	} else {
		family, sa = unix.AF_INET6, &unix.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()}
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("making a socket: %w", err)
	}
	if err = unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err == nil {
		if err = unix.Connect(fd, sa); err == nil {
			return fd, nil
		}
	}
	unix.Close(fd)
	return -1, fmt.Errorf("connecting to %s: %w", to, err)
}

func request(fd int) error {
	b := []byte{askEcho}
	if _, err := unix.Write(fd, b); err != nil {
		return fmt.Errorf("asking: %w", err)
	}
	if n, err := unix.Read(fd, b); n != 1 {
		return fmt.Errorf("no answer: %w", cause(err))
	}
	return nil
}

func cause(err error) error {
	if err == nil {
		return io.ErrUnexpectedEOF
	}
	return err
}
