package redirect_test

import (
	"encoding/json"
	"errors"
	"net/netip"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/preroute/preroute/plugin/redirect"
)

// FuzzParse holds that no text makes Parse panic, that what it refuses it
// refuses with a short *FieldError on one line, and that what it accepts is
// JSON, prints and reads back to the same policy, and compiles to rules that
// decide something for every kind of connection. Its seeds, beside those below,
// are in testdata/fuzz/FuzzParse.
func FuzzParse(f *testing.F) {
	for _, m := range mistakes {
		f.Add(m.policy)
	}
	conns := sampleConns()
	f.Fuzz(func(t *testing.T, text string) {
		p, err := redirect.Parse(text)
		if err != nil {
			checkFieldError(t, text, err)
			return
		}
		if !json.Valid([]byte(text)) {
			t.Fatalf("accepted what is not JSON: %q", text)
		}
		q, err := redirect.Parse(p.String())
		if err != nil {
			t.Fatalf("%q prints as %s, which is refused: %v", text, p, err)
		}
		if !p.Equal(q) || p.String() != q.String() {
			t.Fatalf("%q prints as %s, which reads as %s", text, p, q)
		}
		rules := p.Rules()
		if p.IsZero() && len(rules) > 0 {
			t.Fatalf("%q redirects nothing, yet compiles to\n%s", text, redirect.Print(rules))
		}
		if again := redirect.Print(q.Rules()); redirect.Print(rules) != again {
			t.Fatalf("%q compiles to\n%s\nand read back to\n%s", text, redirect.Print(rules), again)
		}
		for _, c := range conns {
			checkDecision(t, p, rules, c)
		}
	})
}

func checkFieldError(t *testing.T, text string, err error) {
	t.Helper()
	var field *redirect.FieldError
	if !errors.As(err, &field) {
		t.Fatalf("%q: an error of type %T", text, err)
	}
	msg := err.Error()
	switch {
	case field.Want == "":
		t.Fatalf("%q: the error does not say what is wanted: %q", text, msg)
	case len(msg) > 600:
		t.Fatalf("%q: an error of %d bytes", text, len(msg))
	case !utf8.ValidString(msg) || strings.ContainsAny(msg, "\n\r\x00"):
		t.Fatalf("%q: not one readable line: %q", text, msg)
	}
	// A policy that is JSON and an object has a field that is wrong; the error names it.
	var object map[string]json.RawMessage
	if json.Unmarshal([]byte(text), &object) == nil && object != nil && field.Field == "" &&
		!strings.Contains(field.Want, "nested too deeply") {
		t.Fatalf("%q: the error names no field: %q", text, msg)
	}
}

// checkDecision holds that a decision names its rule and one of the policy's ports.
func checkDecision(t *testing.T, p *redirect.Policy, rules []redirect.Rule, c redirect.Conn) {
	t.Helper()
	d := redirect.Decide(rules, c)
	ports := map[uint16]bool{p.Inbound.Port: true, p.Outbound.Port: true, p.DNS.Port: true}
	switch d.Verdict {
	case redirect.Pass:
		if d.Port != 0 {
			t.Fatalf("%s: %+v passes with port %d", p, c, d.Port)
		}
	case redirect.Redirect, redirect.TProxy:
		if d.Port == 0 || !ports[d.Port] || d.Rule == nil {
			t.Fatalf("%s: %+v: decision %+v names no port of the policy, or no rule", p, c, d)
		}
	default:
		t.Fatalf("%s: %+v: verdict %q", p, c, d.Verdict)
	}
}

// sampleConns is a connection of every kind that the contract's table tells apart.
func sampleConns() []redirect.Conn {
	var conns []redirect.Conn
	for _, own := range podAddrs {
		loop, far := "127.0.0.1", "192.0.2.9"
		if own.Is6() {
			loop, far = "::1", "2001:db8::9"
		}
		addrs := []netip.Addr{own, netip.MustParseAddr(loop), netip.MustParseAddr(far)}
		for _, src := range addrs {
			for _, dst := range addrs {
				for _, port := range []uint16{1, 53, 80, 8901, 65535} {
					for _, proto := range []redirect.Proto{redirect.ProtoTCP, redirect.ProtoUDP} {
						for _, uid := range []uint32{0, 2102, redirect.MaxID} {
							conns = append(conns, redirect.Conn{
								Proto: proto, Chain: redirect.ChainOutput, Interface: "eth0", UID: uid, GID: uid,
								Src: netip.AddrPortFrom(src, 8901), Dst: netip.AddrPortFrom(dst, port), Own: podAddrs,
							})
						}
						conns = append(conns, redirect.Conn{
							Proto: proto, Chain: redirect.ChainPrerouting, Interface: "eth1",
							Src: netip.AddrPortFrom(src, 40000), Dst: netip.AddrPortFrom(dst, port), Own: podAddrs,
						})
					}
				}
			}
		}
	}
	return conns
}
