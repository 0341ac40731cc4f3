package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A probe is one connection that has to be redirected.
type probe struct {
	name     string // "outbound IPv4"
	from, to netip.AddrPort
	udp      bool
	port     uint16 // of the listener it has to come out at
	closed   bool   // it must not get through at all: tproxy without a transparent listener
}

func (pr *probe) run() (string, error) {
	d := net.Dialer{Timeout: probeTimeout, Control: reuseAddr}
	if pr.from.IsValid() {
		d.LocalAddr = net.TCPAddrFromAddrPort(pr.from)
	}
	network := "tcp"
	if pr.udp {
		network = "udp"
	}
	if pr.closed {
		d.Timeout = probeTimeout / 4 // success is a SYN without an answer
	}
	ctx, cancel := context.WithTimeout(context.Background(), probeTimeout)
	defer cancel()
	c, err := d.DialContext(ctx, network, pr.to.String())
	var timeout net.Error
	switch {
	case pr.closed && errors.As(err, &timeout) && timeout.Timeout():
		return fmt.Sprintf("a connection to %s is kept for the proxy", pr.to), nil
	case pr.closed && err == nil:
		c.Close()
		return "", fmt.Errorf("a connection to %s reached the app", pr.to)
	case errors.Is(err, unix.ENETUNREACH) && !pr.from.IsValid():
		return "no route leads out of the pod, nothing to prove", nil
	case err != nil:
		return "", fmt.Errorf("a connection to %s did not reach port %d: %w", pr.to, pr.port, reasonOf(err))
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(probeTimeout))
	if pr.udp {
		return pr.echo(c)
	}
	said, err := io.ReadAll(io.LimitReader(c, 64))
	if string(said) != greeting(pr.port) {
		if err == nil {
			err = errors.New("something else answered")
		}
		return "", fmt.Errorf("a connection to %s did not reach port %d: %w", pr.to, pr.port, reasonOf(err))
	}
	return fmt.Sprintf("a connection to %s reached port %d", pr.to, pr.port), nil
}

func (pr *probe) echo(c net.Conn) (string, error) {
	msg, buf := greeting(pr.port), make([]byte, 64)
	// One read is enough inside a pod; a second try covers a full queue.
	for range 2 {
		_ = c.SetDeadline(time.Now().Add(probeTimeout / 2))
		if _, err := io.WriteString(c, msg); err != nil {
			return "", fmt.Errorf("a datagram to %s: %w", pr.to, reasonOf(err))
		}
		if n, err := c.Read(buf); err == nil && string(buf[:n]) == msg {
			return fmt.Sprintf("a datagram to %s reached port %d", pr.to, pr.port), nil
		}
	}
	return "", fmt.Errorf("a datagram to %s did not reach port %d", pr.to, pr.port)
}

// reuseAddr lets a probe leave from the same port again while the last one is
// in TIME_WAIT.
func reuseAddr(_, _ string, c syscall.RawConn) error {
	var err error
	if cerr := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) }); cerr != nil {
		return cerr
	}
	return err
}

// reasonOf drops the addresses that net's errors repeat.
func reasonOf(err error) error {
	var op *net.OpError
	if errors.As(err, &op) {
		return op.Err
	}
	return err
}

// greeting is what a listener says, so that no other server is taken for it.
func greeting(port uint16) string { return "preroute-verify " + strconv.Itoa(int(port)) + " " }

func greet(l net.Listener, port uint16) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		_ = c.SetDeadline(time.Now().Add(probeTimeout))
		_, _ = io.WriteString(c, greeting(port))
		c.Close()
	}
}

func echoPackets(c net.PacketConn) {
	buf := make([]byte, 512)
	for {
		n, from, err := c.ReadFrom(buf)
		if err != nil {
			return
		}
		_, _ = c.WriteTo(buf[:n], from)
	}
}
