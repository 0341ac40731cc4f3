package netfilter

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/preroute/preroute/plugin/redirect"
	"golang.org/x/sys/unix"
)

// A line is one nft rule in the making: each method appends one statement, as
// the text nft(8) lists it with and as the expressions nft(8) compiles it to.
type line struct {
	text  []phrase
	exprs []expr.Any
}

// A phrase is text that is put together when somebody reads it: on the path of a
// pod's start nobody does.
type phrase struct {
	format string
	args   []any
}

func say(format string, args ...any) phrase { return phrase{format, args} }

// implied shortens a rule as nft lists it: a protocol that the next statement
// implies is not said.
var implied = strings.NewReplacer(
	"meta nfproto ipv4 ip ", "ip ", "meta nfproto ipv6 ip6 ", "ip6 ",
	"meta l4proto tcp tcp ", "tcp ", "meta l4proto udp udp ", "udp ")

// String is the line as nft lists it.
func (l *line) String() string {
	words := make([]string, len(l.text))
	for i, p := range l.text {
		words[i] = fmt.Sprintf(p.format, p.args...)
	}
	return implied.Replace(strings.Join(words, " "))
}

func (l *line) add(text phrase, exprs ...expr.Any) *line {
	l.text = append(l.text, text)
	l.exprs = append(l.exprs, exprs...)
	return l
}

func (l *line) join(other *line) *line {
	l.text = append(l.text, other.text...)
	l.exprs = append(l.exprs, other.exprs...)
	return l
}

// reg is the one register of all our rules: each statement loads it afresh.
const reg = unix.NFT_REG_1

func cmpOp(op string) expr.CmpOp {
	if op == "!=" {
		return expr.CmpOpNeq
	}
	return expr.CmpOpEq
}

// sign is how nft lists the operator: equality is not written.
func sign(op string) string {
	if op == "!=" {
		return "!= "
	}
	return ""
}

func cmp(op string, data []byte) *expr.Cmp {
	return &expr.Cmp{Op: cmpOp(op), Register: reg, Data: data}
}

func lookup(s *nftSet, op string) *expr.Lookup {
	return &expr.Lookup{SourceRegister: reg, SetName: s.name, Invert: op == "!="}
}

func u32(n uint32) []byte { return binaryutil.NativeEndian.PutUint32(n) }

// meta l4proto tcp; meta l4proto != udp
func (l *line) l4proto(op string, protos redirect.Proto) *line {
	for _, p := range protos.Each() {
		l.add(say("meta l4proto %s%s", sign(op), p),
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg}, cmp(op, []byte{protoNumber(p)}))
	}
	return l
}

// meta nfproto ipv4
func (l *line) nfproto(a netip.Addr) *line {
	name, id := "ipv4", byte(unix.NFPROTO_IPV4)
	if a.Is6() {
		name, id = "ipv6", unix.NFPROTO_IPV6
	}
	return l.add(say("meta nfproto %s", name), &expr.Meta{Key: expr.MetaKeyNFPROTO, Register: reg}, cmp("==", []byte{id}))
}

// iifname "eth1"
func (l *line) ifname(key, name string) *line {
	k := expr.MetaKeyIIFNAME
	if key == "oifname" {
		k = expr.MetaKeyOIFNAME
	}
	return l.add(say("%s %q", key, name), &expr.Meta{Key: k, Register: reg}, cmp("==", ifnameKey(name)))
}

func ifnameKey(name string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, name)
	return b
}

// oifname @except_interfaces
func (l *line) interfaces(t *nftTable, chain redirect.Chain, names []string) *line {
	key, k := "iifname", expr.MetaKeyIIFNAME
	if chain == redirect.ChainOutput {
		key, k = "oifname", expr.MetaKeyOIFNAME
	}
	if len(names) == 1 {
		return l.ifname(key, names[0])
	}
	s := t.set(interfaceSet(names))
	return l.add(say("%s @%s", key, s.name), &expr.Meta{Key: k, Register: reg}, lookup(s, "=="))
}

// meta skuid 2102; meta skgid @skgids
func (l *line) ids(t *nftTable, key string, ids []uint32) *line {
	k, typ := expr.MetaKeySKUID, nftables.TypeUID
	if key == "skgid" {
		k, typ = expr.MetaKeySKGID, nftables.TypeGID
	}
	load := &expr.Meta{Key: k, Register: reg}
	if len(ids) == 1 {
		return l.add(say("meta %s %d", key, ids[0]), load, cmp("==", u32(ids[0])))
	}
	s := t.set(idSet(key+"s", typ, ids))
	return l.add(say("meta %s @%s", key, s.name), load, lookup(s, "=="))
}

func addrOffset(a netip.Addr, field string) (offset, size uint32) {
	switch {
	case a.Is4() && field == "saddr":
		return 12, 4 // RFC 791, 3.1
	case a.Is4():
		return 16, 4
	case field == "saddr":
		return 8, 16 // RFC 8200, 3
	default:
		return 24, 16
	}
}

func loadAddr(a netip.Addr, field string) (string, *expr.Payload) {
	offset, size := addrOffset(a, field)
	name := "ip "
	if a.Is6() {
		name = "ip6 "
	}
	return name + field, &expr.Payload{DestRegister: reg, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: size}
}

// ip daddr 127.0.0.0/8
func (l *line) addr(field, op string, n netip.Prefix) *line {
	name, load := loadAddr(n.Addr(), field)
	if n.IsSingleIP() {
		return l.add(say("%s %s%s", name, sign(op), n.Addr()), load, cmp(op, n.Addr().AsSlice()))
	}
	size := load.Len
	mask := prefixMask(n.Bits(), int(size))
	return l.add(say("%s %s%s", name, sign(op), n), load,
		&expr.Bitwise{SourceRegister: reg, DestRegister: reg, Len: size, Mask: mask, Xor: make([]byte, size)},
		cmp(op, n.Addr().AsSlice()))
}

// ip daddr & 255.255.255.0 == @except_nets4_24
func (l *line) masked(field, op string, bits int, s *nftSet) *line {
	size := int(s.key.Bytes)
	a, _ := netip.AddrFromSlice(make([]byte, size))
	name, load := loadAddr(a, field)
	exprs, is := []expr.Any{load}, sign(op)
	if bits < size*8 {
		if op == "==" {
			is = "== "
		}
		mask := prefixMask(bits, size)
		m, _ := netip.AddrFromSlice(mask)
		name += " & " + m.String()
		exprs = append(exprs, &expr.Bitwise{SourceRegister: reg, DestRegister: reg, Len: uint32(size), Mask: mask, Xor: make([]byte, size)})
	}
	return l.add(say("%s %s@%s", name, is, s.name), append(exprs, lookup(s, op))...)
}

func prefixMask(bits, size int) []byte {
	mask := make([]byte, size)
	for i := range bits {
		mask[i/8] |= 0x80 >> (i % 8)
	}
	return mask
}

func loadPort(proto redirect.Proto, field string) (string, *expr.Payload) {
	offset := uint32(0) // RFC 9293, 3.1 and RFC 768
	if field == "dport" {
		offset = 2
	}
	name := "th "
	if proto != 0 {
		name = proto.String() + " "
	}
	return name + field, &expr.Payload{DestRegister: reg, Base: expr.PayloadBaseTransportHeader, Offset: offset, Len: 2}
}

// tcp sport 8901
func (l *line) port(proto redirect.Proto, field, op string, port uint16) *line {
	name, load := loadPort(proto, field)
	return l.add(say("%s %s%d", name, sign(op), port), load, cmp(op, be16(port)))
}

// fib daddr type local
func (l *line) fib(field string, is redirect.Locality) *line {
	if is == redirect.Anywhere {
		return l
	}
	op := "=="
	if is == redirect.NotLocal {
		op = "!="
	}
	return l.add(say("fib %s type %slocal", field, sign(op)),
		&expr.Fib{Register: reg, ResultADDRTYPE: true, FlagSADDR: field == "saddr", FlagDADDR: field == "daddr"},
		cmp(op, u32(unix.RTN_LOCAL)))
}

// The directions of a connection, IP_CT_DIR_* of the kernel.
const (
	directionOriginal byte = 0
	directionReply    byte = 1
)

// ct direction reply
func (l *line) ctDirection(dir byte) *line {
	name := "original"
	if dir == directionReply {
		name = "reply"
	}
	return l.add(say("ct direction %s", name), &expr.Ct{Register: reg, Key: expr.CtKeyDIRECTION}, cmp("==", []byte{dir}))
}

func hasBit(bit uint32) []expr.Any {
	return []expr.Any{
		&expr.Bitwise{SourceRegister: reg, DestRegister: reg, Len: 4, Mask: u32(bit), Xor: u32(0)},
		cmp("!=", u32(0)),
	}
}

func setBit(bit uint32) expr.Any {
	return &expr.Bitwise{SourceRegister: reg, DestRegister: reg, Len: 4, Mask: u32(^bit), Xor: u32(bit)}
}

// ct state new
func (l *line) ctNew() *line {
	return l.add(say("ct state new"), append([]expr.Any{&expr.Ct{Register: reg, Key: expr.CtKeySTATE}}, hasBit(expr.CtStateBitNEW)...)...)
}

// ct mark & 0x2000000 != 0
func (l *line) ctMark(bit uint32) *line {
	return l.add(say("ct mark & 0x%08x != 0x00000000", bit), append([]expr.Any{&expr.Ct{Register: reg, Key: expr.CtKeyMARK}}, hasBit(bit)...)...)
}

// meta mark & 0x1000000 != 0
func (l *line) mark(bit uint32) *line {
	return l.add(say("meta mark & 0x%08x != 0x00000000", bit), append([]expr.Any{&expr.Meta{Key: expr.MetaKeyMARK, Register: reg}}, hasBit(bit)...)...)
}

// ct mark set ct mark | 0x2000000
func (l *line) ctMarkSet(bit uint32) *line {
	return l.counter().add(say("ct mark set ct mark | 0x%08x", bit),
		&expr.Ct{Register: reg, Key: expr.CtKeyMARK}, setBit(bit), &expr.Ct{Register: reg, Key: expr.CtKeyMARK, SourceRegister: true})
}

// meta mark set meta mark | 0x1000000
func (l *line) markSet(bit uint32) *line {
	return l.add(say("meta mark set meta mark | 0x%08x", bit),
		&expr.Meta{Key: expr.MetaKeyMARK, Register: reg}, setBit(bit), &expr.Meta{Key: expr.MetaKeyMARK, Register: reg, SourceRegister: true})
}

// ct status dnat
func (l *line) ctDNAT() *line {
	const dstNAT = 1 << 5 // IPS_DST_NAT
	return l.add(say("ct status dnat"), append([]expr.Any{&expr.Ct{Register: reg, Key: expr.CtKeySTATUS}}, hasBit(dstNAT)...)...)
}

// ct zone 28786
func (l *line) ctZone() *line {
	return l.add(say("ct zone %d", routeID),
		&expr.Ct{Register: reg, Key: expr.CtKeyZONE}, cmp("==", binaryutil.NativeEndian.PutUint16(routeID)))
}

// ct zone set 28786 accept
func (l *line) ctZoneSet() *line {
	l.add(say("ct zone set %d", routeID),
		&expr.Immediate{Register: reg, Data: binaryutil.NativeEndian.PutUint16(routeID)},
		&expr.Ct{Register: reg, Key: expr.CtKeyZONE, SourceRegister: true})
	return l.verdict(expr.VerdictAccept, "")
}

// tcp flags syn / fin,syn,rst,ack
func (l *line) syn() *line {
	const fin, syn, rst, ack = 0x01, 0x02, 0x04, 0x10 // RFC 9293, 3.1
	return l.add(say("tcp flags syn / fin,syn,rst,ack"),
		&expr.Payload{DestRegister: reg, Base: expr.PayloadBaseTransportHeader, Offset: 13, Len: 1},
		&expr.Bitwise{SourceRegister: reg, DestRegister: reg, Len: 1, Mask: []byte{fin | syn | rst | ack}, Xor: []byte{0}},
		cmp("==", []byte{syn}))
}

func (l *line) counter() *line { return l.add(say("counter packets 0 bytes 0"), &expr.Counter{}) }

// counter packets 0 bytes 0 accept
func (l *line) verdict(kind expr.VerdictKind, chain string) *line {
	text := say("accept")
	switch kind {
	case expr.VerdictDrop:
		text = say("drop")
	case expr.VerdictJump:
		text = say("jump %s", chain)
	}
	return l.counter().add(text, &expr.Verdict{Kind: kind, Chain: chain})
}

// counter packets 0 bytes 0 redirect to :8900
func (l *line) redirect(port uint16) *line {
	return l.counter().add(say("redirect to :%d", port),
		&expr.Immediate{Register: reg, Data: be16(port)},
		&expr.Redir{RegisterProtoMin: reg, RegisterProtoMax: reg, Flags: unix.NF_NAT_RANGE_PROTO_SPECIFIED})
}

// tproxy to :8901 counter packets 0 bytes 0 accept
//
// Without a listener the expression breaks off the rule, and the next one is
// tried: what stands behind must not let a new connection pass.
func (l *line) tproxy(port uint16) *line {
	l.add(say("tproxy to :%d", port),
		&expr.Immediate{Register: reg, Data: be16(port)},
		&expr.TProxy{Family: unix.NFPROTO_UNSPEC, TableFamily: unix.NFPROTO_INET, RegPort: reg})
	return l.verdict(expr.VerdictAccept, "")
}

// counter packets 0 bytes 0 snat ip to 127.0.0.1 fully-random
//
// Left to itself the kernel keeps the source port where it can, and two CPUs
// that find the same one free at once lose a packet: one of 3000 in a burst.
func (l *line) snat(a netip.Addr) *line {
	fam, family := "ip", uint32(unix.NFPROTO_IPV4)
	if a.Is6() {
		fam, family = "ip6", unix.NFPROTO_IPV6
	}
	return l.counter().add(say("snat %s to %s fully-random", fam, a),
		&expr.Immediate{Register: reg, Data: a.AsSlice()},
		&expr.NAT{Type: expr.NATTypeSourceNAT, Family: family, RegAddrMin: reg, FullyRandom: true})
}
