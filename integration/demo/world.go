package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/miekg/dns"
	"github.com/vishvananda/netlink"

	"github.com/preroute/preroute/integration/sandbox"
)

// Everything that waits for a condition gives up after this long.
const patience = 5 * time.Second

// A world is the other namespace: the node that the pod is wired to, and a
// server somewhere behind it.
type world struct {
	netns   *sandbox.Netns
	closers []io.Closer
}

var worldAddrs = map[int][]netip.Addr{ // of each family: the server, and one the policy excepts
	4: {netip.MustParseAddr("198.51.100.7"), netip.MustParseAddr("198.51.100.99")},
	6: {netip.MustParseAddr("2001:db8:77::7"), netip.MustParseAddr("2001:db8:77::99")},
}

func (w *world) addr(family int, port uint16) netip.AddrPort {
	return netip.AddrPortFrom(worldAddrs[family][0], port)
}

func (w *world) excepted(family int, port uint16) netip.AddrPort {
	return netip.AddrPortFrom(worldAddrs[family][1], port)
}

func (w *world) addrs() string { return fmt.Sprintf("%s, %s", worldAddrs[4][0], worldAddrs[6][0]) }

func newWorld() (w *world, err error) {
	w = &world{}
	defer func() {
		if err != nil {
			w.close()
		}
	}()
	if w.netns, err = newNetns(); err != nil {
		return w, err
	}
	w.closers = append(w.closers, w.netns)
	err = w.netns.Do(func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		for _, addrs := range worldAddrs {
			for _, a := range addrs {
				p := netip.PrefixFrom(a, a.BitLen()).String()
				ip, err := netlink.ParseAddr(p)
				if err != nil {
					return err
				}
				if err := netlink.AddrAdd(lo, ip); err != nil {
					return fmt.Errorf("adding %s: %w", p, err)
				}
			}
		}
		return nil
	})
	if err != nil {
		return w, err
	}
	for _, port := range []uint16{80, 9443} {
		closers, err := serve(w.netns, 0, port, "world")
		w.closers = append(w.closers, closers...)
		if err != nil {
			return w, err
		}
	}
	return w, w.serveDNS()
}

func (w *world) close() {
	for _, c := range w.closers {
		c.Close()
	}
}

// newNetns makes a namespace whose IPv6 addresses can be used at once; nobody
// else is on its links.
func newNetns() (*sandbox.Netns, error) {
	n, err := sandbox.New()
	if err != nil {
		return nil, err
	}
	if err := n.Sysctl("net/ipv6/conf/default/accept_dad", "0"); err != nil {
		n.Close()
		return nil, err
	}
	return n, nil
}

// serve answers every connection with one line: its own name, and whom it sees.
func serve(n *sandbox.Netns, uid int, port uint16, name string) ([]io.Closer, error) {
	lns, err := n.Listen(uid, port)
	var closers []io.Closer
	for _, ln := range lns {
		closers = append(closers, ln)
		go func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				fmt.Fprintf(c, "%s %s\n", name, c.RemoteAddr())
				c.Close()
			}
		}()
	}
	return closers, err
}

// serveDNS answers every query with a TXT record: whom the server sees.
func (w *world) serveDNS() error {
	handler := dns.HandlerFunc(func(rw dns.ResponseWriter, q *dns.Msg) {
		m := new(dns.Msg).SetReply(q)
		m.Answer = []dns.RR{&dns.TXT{
			Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeTXT, Class: dns.ClassINET},
			Txt: []string{"world " + rw.RemoteAddr().String()},
		}}
		_ = rw.WriteMsg(m) // a client that is gone is told nothing
	})
	start := func(srv *dns.Server) { go srv.ActivateAndServe() }
	lns, err := w.netns.Listen(0, 53)
	for _, ln := range lns {
		w.closers = append(w.closers, ln)
		start(&dns.Server{Listener: ln, Handler: handler})
	}
	if err != nil {
		return err
	}
	return w.netns.Do(func() error {
		for family, network := range map[int]string{4: "udp4", 6: "udp6"} {
			// Bound to the one address, so that answers come from it.
			pc, err := net.ListenPacket(network, w.addr(family, 53).String())
			if err != nil {
				return err
			}
			w.closers = append(w.closers, pc)
			start(&dns.Server{PacketConn: pc, Handler: handler})
		}
		return nil
	})
}

// A sidecar is the running proxy and what it has logged.
type sidecar struct {
	kill   context.CancelFunc
	exited chan error

	mu     sync.Mutex
	events []event
	news   chan struct{} // closed and replaced when events grows
}

// An event is a line of the proxy's log; the proxy documents the fields.
type event struct{ Event, Direction, Client, Original, Name, Detail string }

func startSidecar(ctx context.Context, path string, n *sandbox.Netns, upstream netip.AddrPort) (*sidecar, error) {
	ctx, kill := context.WithCancel(ctx)
	s := &sidecar{kill: kill, exited: make(chan error, 1), news: make(chan struct{})}
	cmd := exec.CommandContext(ctx, path, "-outbound=8900", "-inbound=8901", "-dns=15053", "-dns-upstream="+upstream.String())
	cmd.Stderr = os.Stderr
	// Pdeathsig goes by the thread that started the process: it stays to wait.
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Credential: &syscall.Credential{Uid: proxyUID, Gid: proxyUID},
		Pdeathsig:  syscall.SIGKILL,
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		kill()
		return nil, err
	}
	go func() {
		s.exited <- n.Do(func() error {
			if err := cmd.Start(); err != nil {
				return err
			}
			for in := bufio.NewScanner(out); in.Scan(); {
				var e event
				if err := json.Unmarshal(in.Bytes(), &e); err == nil {
					s.add(e)
				}
			}
			return cmd.Wait()
		})
	}()
	if _, err := s.await(func(e event) bool { return e.Event == "ready" }); err != nil {
		s.stop()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return s, nil
}

func (s *sidecar) stop() {
	s.kill()
	err := <-s.exited
	s.exited <- err // so that stopping twice is fine
}

func (s *sidecar) add(e event) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.events = append(s.events, e)
	close(s.news)
	s.news = make(chan struct{})
}

// await returns the first event that is wanted, once it is there.
func (s *sidecar) await(wanted func(event) bool) (event, error) {
	timeout := time.After(patience)
	for {
		s.mu.Lock()
		events, news := s.events, s.news
		s.mu.Unlock()
		for _, e := range events {
			if wanted(e) {
				return e, nil
			}
		}
		select {
		case <-news:
		case err := <-s.exited:
			s.exited <- err
			return event{}, fmt.Errorf("the proxy ended: %v", err)
		case <-timeout:
			return event{}, errors.New("the proxy has not logged it")
		}
	}
}

// dial connects in a namespace under a UID and reads the server's line: its
// name, and whom it sees.
func dial(n *sandbox.Netns, uid int, to netip.AddrPort) (local netip.AddrPort, line string, err error) {
	err = n.As(uid, func() error {
		d := net.Dialer{Timeout: patience}
		d.SetMultipathTCP(false)
		c, err := d.Dial("tcp", to.String())
		if err != nil {
			return err
		}
		defer c.Close()
		local = netip.MustParseAddrPort(c.LocalAddr().String())
		if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
			return err
		}
		line, err = bufio.NewReader(c).ReadString('\n')
		line = strings.TrimSpace(line)
		return err
	})
	return local, line, err
}

// ask sends a DNS query in a namespace under a UID; the socket is connected,
// so an answer from anybody but the server asked does not reach it.
func ask(n *sandbox.Netns, uid int, network string, server netip.AddrPort, name string) (local netip.AddrPort, text string, err error) {
	err = n.As(uid, func() error {
		c := dns.Client{Net: network, Timeout: patience}
		conn, err := c.Dial(server.String())
		if err != nil {
			return err
		}
		defer conn.Close()
		local = netip.MustParseAddrPort(conn.LocalAddr().String())
		answer, _, err := c.ExchangeWithConn(new(dns.Msg).SetQuestion(name, dns.TypeTXT), conn)
		if err != nil {
			return err
		}
		if len(answer.Answer) != 1 {
			return fmt.Errorf("no answer: %s", dns.RcodeToString[answer.Rcode])
		}
		text = answer.Answer[0].(*dns.TXT).Txt[0]
		return nil
	})
	return local, text, err
}
