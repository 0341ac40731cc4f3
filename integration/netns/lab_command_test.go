package netns_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// The commands of an agent, by request.Op:
//
//	listen    a TCP server that does what the first line of a connection says:
//	          "describe" answers with its view of the connection, "echo" sends
//	          back what comes, and "via X" makes it a proxy that connects to the
//	          original destination and sends X on
//	dns       a DNS server that answers with its view of the query
//	close     closes the servers named Who
//	accepted  how many connections the servers named Who took
//	dial      connects to each of Remotes, says Say, tells the outcomes
//	echo      sends Bytes over each of Count connections and compares
//	query     asks each of Remotes, Count times all at once
//
// A server never decides what is right; the test does, from what clients got.

// patience bounds everything an agent does with a peer, so that no fault of the
// rules can hang a test.
const patience = 20 * time.Second

type servers struct {
	mu       sync.Mutex
	open     []server
	accepted map[string]int
	onward   sync.Mutex // held by a DNS proxy that asks its own server
}

type server struct {
	who string
	io.Closer
}

func (s *servers) command(r request) (a answer) {
	var err error
	switch r.Op {
	case "listen":
		err = s.listen(r)
	case "dns":
		err = s.serveDNS(r)
	case "close":
		a.Count = s.close(r.Who)
	case "accepted":
		s.mu.Lock()
		a.Count = s.accepted[r.Who]
		s.mu.Unlock()
	case "dial":
		for _, remote := range r.Remotes {
			a.Outcomes = append(a.Outcomes, dial(r, remote))
		}
	case "echo":
		a.Outcomes = atOnce(r.Count, func(i int) outcome { return echo(r, r.Remotes[i%len(r.Remotes)]) })
	case "query":
		a.Outcomes = queries(r)
	default:
		err = fmt.Errorf("unknown operation %q", r.Op)
	}
	if err != nil {
		a.Err = err.Error()
	}
	return a
}

func (s *servers) add(who string, c io.Closer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.open = append(s.open, server{who, c})
}

func (s *servers) close(who string) (closed int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	kept := s.open[:0]
	for _, c := range s.open {
		if c.who == who {
			c.Close()
			closed++
		} else {
			kept = append(kept, c)
		}
	}
	s.open = kept
	return closed
}

func (s *servers) took(who string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.accepted[who]++
}

func atOnce(n int, f func(int) outcome) []outcome {
	out := make([]outcome, n)
	var wg sync.WaitGroup
	for i := range out {
		wg.Go(func() { out[i] = f(i) })
	}
	wg.Wait()
	return out
}

// accept hands each connection to serve, until the listener is closed.
func (s *servers) accept(who string, l net.Listener, serve func(*net.TCPConn)) {
	s.add(who, l)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return // closed
			}
			s.took(who)
			go serve(c.(*net.TCPConn))
		}
	}()
}

func (s *servers) listen(r request) error {
	lc := net.ListenConfig{Control: socketOptions(r)}
	lc.SetMultipathTCP(false) // a sidecar's sockets are plain TCP
	l, err := lc.Listen(context.Background(), r.Net, r.Addr)
	if err != nil {
		return err
	}
	s.accept(r.Who, l, func(c *net.TCPConn) { handle(r, c) })
	return nil
}

// handle serves one connection. What fails here the client sees as a broken
// connection, which no test takes for success.
func handle(r request, c *net.TCPConn) {
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	in := bufio.NewReader(c)
	line, err := in.ReadString('\n')
	if err != nil {
		return
	}
	v := view{Who: r.Who, Peer: c.RemoteAddr().String(), Local: c.LocalAddr().String(), Orig: originalDst(c)}
	switch order, rest, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " "); order {
	case "describe":
		json.NewEncoder(c).Encode(v)
	case "echo":
		io.Copy(c, in)
		c.CloseWrite()
	case "via":
		proxy(r, v, c, in, rest)
	}
}

func proxy(r request, v view, c *net.TCPConn, in *bufio.Reader, say string) {
	dst := v.Orig
	if r.Transparent || dst == "" {
		dst = v.Local
	}
	q := request{Net: r.Net}
	switch r.Onward {
	case "":
	case "client":
		peer := netip.MustParseAddrPort(v.Peer)
		q.Local, q.Transparent = netip.AddrPortFrom(peer.Addr(), 0).String(), true
	default:
		q.Local = net.JoinHostPort(r.Onward, "0")
	}
	onward, err := connect(q, dst)
	if err != nil {
		json.NewEncoder(c).Encode(view{Who: r.Who + " cannot reach " + dst + ": " + err.Error()})
		return
	}
	defer onward.Close()
	fmt.Fprintf(onward, "%s\n", say)
	go func() {
		io.Copy(onward, in)
		onward.CloseWrite()
	}()
	io.Copy(c, onward)
	c.CloseWrite()
}

// socketOptions sets, before bind, what a transparent proxy and a busy client
// ask for.
func socketOptions(r request) func(network, address string, c syscall.RawConn) error {
	return func(network, _ string, c syscall.RawConn) error {
		var err error
		ctlErr := c.Control(func(fd uintptr) {
			if r.Transparent && strings.HasSuffix(network, "6") {
				err = unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1)
			} else if r.Transparent {
				err = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_TRANSPARENT, 1)
			}
			if r.Reuse && err == nil {
				err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
			}
			if r.Device != "" && err == nil {
				err = unix.BindToDevice(int(fd), r.Device)
			}
		})
		return errors.Join(ctlErr, err)
	}
}

// originalDst is the destination before NAT: SO_ORIGINAL_DST, or
// IP6T_SO_ORIGINAL_DST, which has the same number; "" when there is none.
func originalDst(c *net.TCPConn) (dst string) {
	const soOriginalDst = 80
	raw, err := c.SyscallConn()
	if err != nil {
		return ""
	}
	raw.Control(func(fd uintptr) {
		if c.LocalAddr().(*net.TCPAddr).IP.To4() != nil {
			// The only typed getter whose buffer takes a sockaddr_in (16 bytes).
			m, err := unix.GetsockoptIPv6Mreq(int(fd), unix.SOL_IP, soOriginalDst)
			if err == nil {
				b := m.Multiaddr
				dst = netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:8])), uint16(b[2])<<8|uint16(b[3])).String()
			}
			return
		}
		// And the one whose buffer begins with a sockaddr_in6.
		m, err := unix.GetsockoptIPv6MTUInfo(int(fd), unix.SOL_IPV6, soOriginalDst)
		if err == nil {
			port := m.Addr.Port<<8 | m.Addr.Port>>8 // in network order
			dst = netip.AddrPortFrom(netip.AddrFrom16(m.Addr.Addr), port).String()
		}
	})
	return dst
}

func connect(r request, remote string) (*net.TCPConn, error) {
	d := net.Dialer{Control: socketOptions(r), Timeout: patience}
	if r.TimeoutMS > 0 {
		d.Timeout = time.Duration(r.TimeoutMS) * time.Millisecond
	}
	d.SetMultipathTCP(false)
	if r.Local != "" {
		local, err := netip.ParseAddrPort(r.Local)
		if err != nil {
			return nil, err
		}
		d.LocalAddr = net.TCPAddrFromAddrPort(local)
	}
	c, err := d.Dial(r.Net, remote)
	if err != nil {
		return nil, err
	}
	c.SetDeadline(time.Now().Add(patience))
	return c.(*net.TCPConn), nil
}

func failure(err error) string {
	var timeout net.Error
	switch {
	case errors.Is(err, unix.ECONNREFUSED):
		return "refused"
	case errors.As(err, &timeout) && timeout.Timeout(), errors.Is(err, os.ErrDeadlineExceeded):
		return "timeout"
	}
	return err.Error()
}

func dial(r request, remote string) (o outcome) {
	c, err := connect(r, remote)
	if err != nil {
		o.Err = failure(err)
		return o
	}
	defer c.Close()
	o.Local = c.LocalAddr().String()
	if _, err = fmt.Fprintf(c, "%s\n", r.Say); err == nil {
		err = json.NewDecoder(c).Decode(&o.View)
	}
	if err != nil {
		o.Err = failure(err)
	}
	return o
}

func echo(r request, remote string) (o outcome) {
	c, err := connect(r, remote)
	if err != nil {
		o.Err = failure(err)
		return o
	}
	defer c.Close()
	o.Local = c.LocalAddr().String()
	sent := make([]byte, r.Bytes)
	rand.Read(sent)
	written := make(chan error, 1)
	go func() {
		_, err := c.Write(append([]byte(r.Say+"\n"), sent...))
		written <- errors.Join(err, c.CloseWrite())
	}()
	h := sha256.New()
	n, err := io.Copy(h, c)
	if err := errors.Join(err, <-written); err != nil {
		o.Err = failure(err)
		return o
	}
	if want := sha256.Sum256(sent); !bytes.Equal(h.Sum(nil), want[:]) {
		o.Err = fmt.Sprintf("%d bytes came back of %d, or others", n, r.Bytes)
	}
	return o
}

func hostPort(host, port string) string { return net.JoinHostPort(host, port) }
