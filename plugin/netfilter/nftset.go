package netfilter

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strconv"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/preroute/preroute/plugin/redirect"
	"golang.org/x/sys/unix"
)

// An nftSet is a named set of the table.
type nftSet struct {
	name     string
	key      nftables.SetDatatype
	host     bool // keys are in host byte order
	interval bool // else a hash, of its elements' number
	elems    []elem
	text     func() []string // the elements as nft lists them
}

// An elem is one key, or with end the first key behind an interval. Small, since
// a thousand of them are a thousand page faults' worth of a pod's start.
type elem struct {
	key [16]byte
	end bool
}

func (s *nftSet) bytes(e *elem) []byte { return e.key[:s.key.Bytes] }

// addAddr spares the copy that a slice of the address would be.
func (s *nftSet) addAddr(a netip.Addr, end bool) {
	e := elem{end: end}
	if a.Is4() {
		four := a.As4()
		copy(e.key[:], four[:])
	} else {
		e.key = a.As16()
	}
	s.elems = append(s.elems, e)
}

func (s *nftSet) add(key []byte, end bool) {
	e := elem{end: end}
	copy(e.key[:], key)
	s.elems = append(s.elems, e)
}

// hashFrom is the number of single ports, or of networks of one size, from which
// on they go in a hash rather than an interval set. The kernel takes 2.4 ms for
// 1000 intervals of two ends each, 0.6 ms for 1000 elements of a hash whose size
// it is told (Linux 6.18).
const hashFrom = 32

// set returns the set of that name and content, made when it is not there yet.
func (t *nftTable) set(s *nftSet) *nftSet {
	for _, have := range t.sets {
		if have.name == s.name && have.key == s.key && slices.Equal(have.elems, s.elems) {
			return have
		}
	}
	base := s.name
	for n := 2; slices.ContainsFunc(t.sets, func(have *nftSet) bool { return have.name == s.name }); n++ {
		s.name = fmt.Sprintf("%s_%d", base, n)
	}
	t.sets = append(t.sets, s)
	return s
}

// texts prints each item of a list.
func texts[T any](list []T, print func(T) string) []string {
	out := make([]string, len(list))
	for i, item := range list {
		out[i] = print(item)
	}
	return out
}

func idSet(name string, key nftables.SetDatatype, ids []uint32) *nftSet {
	s := &nftSet{name: name, key: key, host: true}
	for _, id := range ids {
		s.add(u32(id), false)
	}
	s.text = func() []string {
		return texts(ids, func(id uint32) string { return strconv.FormatUint(uint64(id), 10) })
	}
	return s
}

func interfaceSet(names []string) *nftSet {
	s := &nftSet{name: "except_interfaces", key: nftables.TypeIFName, host: true}
	for _, n := range names {
		s.add(ifnameKey(n), false)
	}
	s.text = func() []string { return texts(names, strconv.Quote) }
	return s
}

func portRangeSet(name string, ports redirect.Ports) *nftSet {
	s := &nftSet{name: name, key: nftables.TypeInetService, interval: true, elems: make([]elem, 0, 2*len(ports))}
	for _, r := range ports {
		s.add(be16(r.First), false)
		if r.Last < 65535 {
			s.add(be16(r.Last+1), true)
		}
	}
	s.text = func() []string { return texts(ports, redirect.PortRange.String) }
	return s
}

// portHash is a set of single ports. A key of two bytes alone the kernel would
// keep in a list; the protocol before it makes it eight.
func portHash(name string, protos redirect.Proto, ports redirect.Ports) *nftSet {
	s := &nftSet{
		name:  name + "_single",
		key:   nftables.MustConcatSetType(nftables.TypeInetProto, nftables.TypeInetService),
		elems: make([]elem, 0, len(ports)),
	}
	for _, p := range protos.Each() {
		for _, r := range ports {
			s.add(binary.BigEndian.AppendUint16([]byte{protoNumber(p), 0, 0, 0}, r.First), false)
		}
	}
	s.text = func() []string {
		var out []string
		for _, p := range protos.Each() {
			out = append(out, texts(ports, func(r redirect.PortRange) string { return fmt.Sprintf("%s . %d", p, r.First) })...)
		}
		return out
	}
	return s
}

func addrSet(name string, of netip.Addr) *nftSet {
	if of.Is4() {
		return &nftSet{name: name + "4", key: nftables.TypeIPAddr}
	}
	return &nftSet{name: name + "6", key: nftables.TypeIP6Addr}
}

func netSet(name string, nets redirect.Nets) *nftSet {
	s := addrSet(name, nets[0].Addr())
	s.interval, s.elems = true, make([]elem, 0, 2*len(nets))
	for _, n := range nets {
		s.addAddr(n.Addr(), false)
		if end := lastAddr(n).Next(); end.IsValid() {
			s.addAddr(end, true)
		}
	}
	s.text = func() []string {
		return texts(nets, func(n netip.Prefix) string {
			if n.IsSingleIP() {
				return n.Addr().String()
			}
			return n.String()
		})
	}
	return s
}

// netHash is a set of networks of one size, looked up by the masked address.
func netHash(name string, nets redirect.Nets) *nftSet {
	s := addrSet(name, nets[0].Addr())
	s.name, s.elems = fmt.Sprintf("%s_%d", s.name, nets[0].Bits()), make([]elem, 0, len(nets))
	for _, n := range nets {
		s.addAddr(n.Addr(), false)
	}
	s.text = func() []string { return texts(nets, func(n netip.Prefix) string { return n.Addr().String() }) }
	return s
}

func lastAddr(n netip.Prefix) netip.Addr {
	b := n.Addr().AsSlice()
	for i := n.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// netTests is the statements of which one (op "==") or all (op "!=") have to
// hold: ip daddr @except_nets4; and for lists of many networks of one size,
// ip daddr & 255.255.255.0 == @except_nets4_24.
func netTests(t *nftTable, field, op string, nets redirect.Nets, set string) []*line {
	if len(nets) == 0 {
		return []*line{{}}
	}
	if len(nets) == 1 && nets[0].Bits() > 0 {
		return []*line{(&line{}).addr(field, op, nets[0])}
	}
	var count [129]int // by size
	for _, n := range nets {
		count[n.Bits()]++
	}
	var tests []*line
	var few redirect.Nets
	for _, n := range nets {
		if count[n.Bits()] < hashFrom {
			few = append(few, n)
		}
	}
	for bits, n := range count {
		if n < hashFrom {
			continue
		}
		many := make(redirect.Nets, 0, n)
		for _, n := range nets {
			if n.Bits() == bits {
				many = append(many, n)
			}
		}
		tests = append(tests, (&line{}).masked(field, op, bits, t.set(netHash(set, many))))
	}
	if len(few) > 0 {
		s := t.set(netSet(set, few))
		name, load := loadAddr(few[0].Addr(), field)
		tests = append(tests, (&line{}).add(say("%s %s@%s", name, sign(op), s.name), load, lookup(s, op)))
	}
	return anyOrAll(op, tests)
}

// anyOrAll puts tests that all have to hold on one line.
func anyOrAll(op string, tests []*line) []*line {
	if op != "!=" {
		return tests
	}
	all := &line{}
	for _, l := range tests {
		all.join(l)
	}
	return []*line{all}
}

// portTests is the statements of which one (op "==") or all (op "!=") have to
// hold: th dport @out_except_ports; and for many single ports,
// meta l4proto . th dport @out_except_ports_single.
func portTests(t *nftTable, proto, protos redirect.Proto, op string, ports redirect.Ports, set string) []*line {
	if len(ports) == 0 {
		return []*line{{}}
	}
	if len(ports) == 1 && ports[0].First == ports[0].Last {
		return []*line{(&line{}).port(proto, "dport", op, ports[0].First)}
	}
	var single, ranges redirect.Ports
	for _, r := range ports {
		if r.First == r.Last {
			single = append(single, r)
		} else {
			ranges = append(ranges, r)
		}
	}
	if len(single) < hashFrom {
		single, ranges = nil, ports
	}
	var tests []*line
	if len(single) > 0 {
		s := t.set(portHash(set, protos, single))
		tests = append(tests, (&line{}).add(say("meta l4proto . th dport %s@%s", sign(op), s.name),
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg},
			&expr.Payload{DestRegister: unix.NFT_REG32_01, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
			lookup(s, op)))
	}
	if len(ranges) > 0 {
		s := t.set(portRangeSet(set, ranges))
		name, load := loadPort(proto, "dport")
		tests = append(tests, (&line{}).add(say("%s %s@%s", name, sign(op), s.name), load, lookup(s, op)))
	}
	return anyOrAll(op, tests)
}
