package netns_test

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"
)

// serveDNS answers each question with a TXT record that holds the view. With
// PacketInfo a UDP server answers from the address it was asked at, as a real
// server does that listens on a wildcard; without, the kernel chooses, as with
// the simplest of proxies. With Onward it passes the question on to that server,
// and that one's answer back, its own name in front.
func (s *servers) serveDNS(r request) error {
	if strings.HasPrefix(r.Net, "tcp") {
		lc := net.ListenConfig{}
		l, err := lc.Listen(context.Background(), r.Net, r.Addr)
		if err != nil {
			return err
		}
		s.accept(r.Who, l, func(c *net.TCPConn) {
			defer c.Close()
			c.SetDeadline(time.Now().Add(patience))
			conn := &dns.Conn{Conn: c}
			if q, err := conn.ReadMsg(); err == nil {
				conn.WriteMsg(s.describe(r, q, view{r.Who, c.RemoteAddr().String(), c.LocalAddr().String(), originalDst(c)}))
			}
		})
		return nil
	}
	pc, err := net.ListenPacket(r.Net, r.Addr)
	if err != nil {
		return err
	}
	c := pc.(*net.UDPConn)
	c.SetReadBuffer(1 << 20) // as much of a burst as a user may keep
	if r.PacketInfo {
		if err := askPacketInfo(c, r.Net); err != nil {
			return err
		}
	}
	s.add(r.Who, c)
	go func() {
		b := make([]byte, 4096)
		for {
			n, session, err := dns.ReadFromSessionUDP(c, b)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			q := new(dns.Msg)
			if err != nil || q.Unpack(b[:n]) != nil || len(q.Question) == 0 {
				continue
			}
			s.took(r.Who)
			peer := session.RemoteAddr().(*net.UDPAddr)
			reply := func() {
				m, err := s.describe(r, q, view{Who: r.Who, Peer: peer.String()}).Pack()
				switch {
				case err != nil:
				case r.PacketInfo:
					dns.WriteToSessionUDP(c, m, session)
				default:
					c.WriteTo(m, peer)
				}
			}
			if r.Onward != "" {
				go reply()
			} else {
				reply()
			}
		}
	}()
	return nil
}

func askPacketInfo(c *net.UDPConn, network string) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	ctlErr := raw.Control(func(fd uintptr) {
		if strings.HasSuffix(network, "6") {
			err = unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_RECVPKTINFO, 1)
		} else {
			err = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_PKTINFO, 1)
		}
	})
	return errors.Join(ctlErr, err)
}

func (s *servers) describe(r request, q *dns.Msg, v view) *dns.Msg {
	if r.Onward != "" {
		// One at a time: with SO_REUSEADDR two of these sockets may have the same
		// addresses and ports, and take each other's answers.
		s.onward.Lock()
		o := ask(request{Net: r.Net, Reuse: true}, r.Onward)
		s.onward.Unlock()
		v.Who += " via " + o.View.Who + o.Err
	}
	m := new(dns.Msg).SetReply(q)
	m.Answer = []dns.RR{&dns.TXT{
		Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeTXT, Class: dns.ClassINET},
		Txt: []string{v.Who, v.Peer, v.Local, v.Orig},
	}}
	return m
}

func queries(r request) []outcome {
	if r.Unconnected {
		return askUnconnected(r)
	}
	slots := make(chan struct{}, cmp.Or(r.Workers, 1<<20))
	return atOnce(max(r.Count, len(r.Remotes)), func(i int) outcome {
		slots <- struct{}{}
		defer func() { <-slots }()
		return ask(r, r.Remotes[i%len(r.Remotes)])
	})
}

// question is a query; its name says to whom it goes, for those who read a capture.
func question(to string) *dns.Msg {
	to = strings.NewReplacer(".", "-", ":", "-", "[", "", "]", "").Replace(to)
	return new(dns.Msg).SetQuestion(dns.Fqdn(to+".test"), dns.TypeTXT)
}

func viewOf(m *dns.Msg) (view, error) {
	if len(m.Answer) == 1 {
		if txt, ok := m.Answer[0].(*dns.TXT); ok && len(txt.Txt) == 4 {
			return view{txt.Txt[0], txt.Txt[1], txt.Txt[2], txt.Txt[3]}, nil
		}
	}
	return view{}, fmt.Errorf("not an answer of this lab: %v", m)
}

// ask sends one question from a socket of its own, connected, and again after a
// while without an answer, as resolvers do: a burst may overflow the server's
// socket.
func ask(r request, remote string) (o outcome) {
	deadline := time.Now().Add(patience)
	if r.TimeoutMS > 0 {
		deadline = time.Now().Add(time.Duration(r.TimeoutMS) * time.Millisecond)
	}
	d := net.Dialer{Control: socketOptions(r), Deadline: deadline}
	if r.Local != "" {
		local, err := netip.ParseAddrPort(r.Local)
		if err != nil {
			o.Err = err.Error()
			return o
		}
		d.LocalAddr = net.UDPAddrFromAddrPort(local)
		if strings.HasPrefix(r.Net, "tcp") {
			d.LocalAddr = net.TCPAddrFromAddrPort(local)
		}
	}
	c, err := d.Dial(r.Net, remote)
	for errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EADDRINUSE) || errors.Is(err, unix.EADDRNOTAVAIL) {
		if time.Now().After(deadline) {
			break
		}
		time.Sleep(2 * time.Millisecond) // all ports of the range are taken: until another query is done
		c, err = d.Dial(r.Net, remote)
	}
	if err != nil {
		o.Err = failure(err)
		return o
	}
	defer c.Close()
	o.Local = c.LocalAddr().String()
	conn, q := &dns.Conn{Conn: c}, question(remote)
	for {
		if err := conn.WriteMsg(q); err != nil {
			o.Err = failure(err)
			return o
		}
		wait := time.Now().Add(500 * time.Millisecond)
		if strings.HasPrefix(r.Net, "tcp") || wait.After(deadline) {
			wait = deadline
		}
		c.SetReadDeadline(wait)
		m, err := conn.ReadMsg()
		if err != nil && failure(err) == "timeout" && time.Now().Before(deadline) {
			continue
		}
		if err == nil && m.Id != q.Id {
			err = errors.New("the answer to another query")
		}
		if err == nil {
			o.View, err = viewOf(m)
		}
		if err != nil {
			o.Err = failure(err)
		}
		o.From = remote // a connected socket takes no other
		return o
	}
}

// askUnconnected asks all remotes from one socket.
func askUnconnected(r request) []outcome {
	out := make([]outcome, len(r.Remotes))
	all := func(err error) []outcome {
		for i := range out {
			if out[i].View.Who == "" {
				out[i].Err = failure(err)
			}
		}
		return out
	}
	lc := net.ListenConfig{Control: socketOptions(r)}
	c, err := lc.ListenPacket(context.Background(), r.Net, r.Local)
	if err != nil {
		return all(err)
	}
	defer c.Close()
	timeout := patience
	if r.TimeoutMS > 0 {
		timeout = time.Duration(r.TimeoutMS) * time.Millisecond
	}
	c.SetDeadline(time.Now().Add(timeout))
	asked := make([]*dns.Msg, len(r.Remotes))
	for i, remote := range r.Remotes {
		asked[i] = question(remote)
		asked[i].Id = uint16(i + 1)
		b, err := asked[i].Pack()
		if err != nil {
			return all(err)
		}
		if _, err := c.WriteTo(b, net.UDPAddrFromAddrPort(netip.MustParseAddrPort(remote))); err != nil {
			return all(err)
		}
	}
	b := make([]byte, 4096)
	for range r.Remotes {
		n, from, err := c.ReadFrom(b)
		if err != nil {
			return all(err)
		}
		m := new(dns.Msg)
		if err := m.Unpack(b[:n]); err != nil {
			return all(err)
		}
		i := slices.IndexFunc(asked, func(q *dns.Msg) bool { return q.Id == m.Id })
		if i < 0 {
			return all(fmt.Errorf("an answer to no query of ours: %v", m))
		}
		out[i].From, out[i].Local = from.String(), c.LocalAddr().String()
		if out[i].View, err = viewOf(m); err != nil {
			out[i].Err = err.Error()
		}
	}
	return out
}
