package netfilter

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strconv"

	"github.com/google/nftables"
	"github.com/preroute/preroute/plugin/redirect"
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

func (s *nftSet) add(key []byte, end bool) {
	e := elem{end: end}
	copy(e.key[:], key)
	s.elems = append(s.elems, e)
}

// hashFrom is the number of single ports, or of networks of one size, from which
// on they go in a hash rather than an interval set. The kernel takes 2.4 ms for
// 1000 intervals of two ends each, 0.6 ms for 1000 elements of a hash whose size
// it is told (Linux 6.18).
const hashFrom = 64

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
		s.add(n.Addr().AsSlice(), false)
		if end := lastAddr(n).Next(); end.IsValid() {
			s.add(end.AsSlice(), true)
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
		s.add(n.Addr().AsSlice(), false)
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
