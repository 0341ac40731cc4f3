package main

import (
	"net"
	"time"

	"github.com/miekg/dns"
)

// serveDNSUDP and serveDNSTCP answer the app's captured queries by asking the
// upstream server, over the protocol the app used. The proxy's own queries go
// out under its own UID, so the policy leaves them alone.
func (s *sidecar) serveDNSUDP(pc net.PacketConn) {
	s.serveDNS(&dns.Server{PacketConn: pc, Handler: s.forward("udp")})
}

func (s *sidecar) serveDNSTCP(ln net.Listener) {
	s.serveDNS(&dns.Server{Listener: ln, Handler: s.forward("tcp")})
}

func (s *sidecar) serveDNS(srv *dns.Server) {
	if err := srv.ActivateAndServe(); err != nil {
		s.log(event{Event: "failed", Direction: "dns", Detail: err.Error()})
	}
}

func (s *sidecar) forward(network string) dns.HandlerFunc {
	return func(w dns.ResponseWriter, q *dns.Msg) {
		e := event{Event: "dns", Direction: network, Client: w.RemoteAddr().String()}
		if len(q.Question) > 0 {
			e.Name = q.Question[0].Name
		}
		c := dns.Client{Net: network, Timeout: 5 * time.Second}
		answer, _, err := c.Exchange(q, s.upstream)
		if err != nil {
			e.Detail = err.Error()
			answer = new(dns.Msg).SetRcode(q, dns.RcodeServerFailure)
		}
		s.log(e)
		if err := w.WriteMsg(answer); err != nil {
			s.log(event{Event: "failed", Direction: "dns", Client: e.Client, Detail: err.Error()})
		}
	}
}
