// Program sidecar is a transparent proxy for the demo and for trying a policy
// by hand: it accepts what Preroute redirects, asks the kernel where each
// connection was going, and dials on. It is no proxy for production: it does
// not limit connections, and its DNS side forwards to one server.
//
// It prints one JSON object a line (see [event]) on stdout, the first of them
// "ready" once every listener is bound.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"sync"
	"syscall"
)

func main() { os.Exit(run()) }

func run() int {
	var s sidecar
	out := flag.Uint("outbound", 8900, "port for the app's connections; 0: none")
	in := flag.Uint("inbound", 8901, "port for connections to the pod; 0: none")
	dns := flag.Uint("dns", 0, "port for the app's DNS; 0: none")
	flag.StringVar(&s.upstream, "dns-upstream", "", "DNS server to forward to, ADDR:PORT")
	flag.BoolVar(&s.tproxy, "tproxy", false, "the inbound port is reached by TPROXY: take the original destination from the socket (needs CAP_NET_ADMIN)")
	flag.BoolVar(&s.keepClient, "keep-client", false, "with -tproxy: dial the app from the client's address")
	flag.Parse()
	if flag.NArg() > 0 || *out > 65535 || *in > 65535 || *dns > 65535 {
		flag.Usage()
		return 2
	}

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := s.start(ctx, uint16(*out), uint16(*in), uint16(*dns)); err != nil {
		fmt.Fprintln(os.Stderr, "sidecar:", err)
		return 1
	}
	s.log(event{Event: "ready"})
	<-ctx.Done()
	return 0
}

// A sidecar is the proxy's configuration and its log.
type sidecar struct {
	upstream   string
	tproxy     bool
	keepClient bool
	inbound    uint16

	mu sync.Mutex // of stdout
}

// An event is one line of the log.
type event struct {
	Event     string `json:"event"`               // ready, open, refused, failed, dns
	Direction string `json:"direction,omitempty"` // outbound or inbound; of dns: udp or tcp
	Client    string `json:"client,omitempty"`    // the peer of the accepted socket
	Original  string `json:"original,omitempty"`  // where the client was going
	Name      string `json:"name,omitempty"`      // what a DNS query asked for
	Detail    string `json:"detail,omitempty"`    // why it was refused or failed
}

func (s *sidecar) log(e event) {
	s.mu.Lock()
	defer s.mu.Unlock()
	// A log whose reader is gone is no reason to stop proxying.
	_ = json.NewEncoder(os.Stdout).Encode(e)
}

// start binds every listener, each family with a socket of its own, so that
// the socket's family says which original-destination option to ask.
func (s *sidecar) start(ctx context.Context, out, in, dns uint16) error {
	s.inbound = in
	var lc net.ListenConfig
	// A Multipath TCP socket does not answer the original-destination options.
	lc.SetMultipathTCP(false)
	for _, family := range []struct{ suffix, wildcard string }{{"4", "0.0.0.0"}, {"6", "::"}} {
		listen := func(port uint16, control func(string, string, syscall.RawConn) error, serve func(net.Listener)) error {
			if port == 0 {
				return nil
			}
			lc := lc
			lc.Control = control
			ln, err := lc.Listen(ctx, "tcp"+family.suffix, netip.AddrPortFrom(netip.MustParseAddr(family.wildcard), port).String())
			if err != nil {
				return fmt.Errorf("listening: %w", err)
			}
			go serve(ln)
			return nil
		}
		var control func(string, string, syscall.RawConn) error
		if s.tproxy {
			control = transparent
		}
		if err := listen(out, nil, func(ln net.Listener) { s.serve(ln, "outbound", originalDst) }); err != nil {
			return err
		}
		if err := listen(in, control, func(ln net.Listener) { s.serve(ln, "inbound", s.inboundDst) }); err != nil {
			return err
		}
		if err := listen(dns, nil, s.serveDNSTCP); err != nil {
			return err
		}
		if dns != 0 {
			pc, err := lc.ListenPacket(ctx, "udp"+family.suffix, netip.AddrPortFrom(netip.MustParseAddr(family.wildcard), dns).String())
			if err != nil {
				return fmt.Errorf("listening: %w", err)
			}
			go s.serveDNSUDP(pc)
		}
	}
	return nil
}
