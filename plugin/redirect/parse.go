package redirect

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"unicode"
)

// FieldError says which field of a policy is wrong, what it holds, and what it
// should hold.
type FieldError struct {
	Field string // "outbound.exceptPorts", "proxy.uids[1]"; empty for the policy as a whole
	Value string // as written, shortened
	Want  string
}

func (e *FieldError) Error() string {
	parts := make([]string, 0, 3)
	for _, s := range []string{e.Field, e.Value, e.Want} {
		if s != "" {
			parts = append(parts, s)
		}
	}
	return strings.Join(parts, ": ")
}

// Parse reads a policy from JSON, strictly: an unknown field, a wrong type, a
// field given twice, or anything behind the policy is an error. Sets come out
// sorted, overlaps merged. Every error is a [*FieldError].
//
// encoding/json alone would not do: it matches names without regard to case,
// lets the last of two equal names win, and loses the path in its errors.
func Parse(text string) (*Policy, error) {
	n, err := parseJSON(text)
	if err != nil {
		return nil, &FieldError{Value: short(text), Want: "not valid JSON: " + err.Error()}
	}
	return fromNode(n)
}

// maxDepth is above the two levels that a policy has, and low enough that a
// hostile annotation costs nothing.
const maxDepth = 8

// A node is one JSON value; of an object or a list with those inside it, in the
// order they were written.
type node struct {
	kind  byte   // '{', '[', '"', '0', 't' (either boolean) or 'n' (null)
	name  string // of a member of an object
	value string // of a string what it says, else as written
	kids  []node
}

// text is the value as written, shortened, for errors.
func (n *node) text() string {
	if n.kind == '"' {
		return short(strconv.Quote(n.value))
	}
	return short(n.value)
}

// parseJSON reads exactly one JSON value.
func parseJSON(text string) (node, error) {
	d := json.NewDecoder(strings.NewReader(text))
	var whole json.RawMessage
	if err := d.Decode(&whole); err != nil {
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			err = errors.New("it ends too early")
		}
		return node{}, err
	}
	if rest := strings.Trim(text[d.InputOffset():], " \t\r\n"); rest != "" {
		return node{}, fmt.Errorf("a second value follows: %s", short(rest))
	}
	r := reader{text: text}
	return r.value(0)
}

// A reader takes apart JSON that is known to be sound, without copying it:
// json.Decoder.Token takes ten times as long.
type reader struct {
	text string
	at   int
}

// peek returns the next byte that means something.
func (r *reader) peek() byte {
	for strings.IndexByte(" \t\r\n,:", r.text[r.at]) >= 0 {
		r.at++
	}
	return r.text[r.at]
}

func (r *reader) value(depth int) (n node, err error) {
	if depth > maxDepth {
		return node{}, errors.New("nested too deeply")
	}
	n.kind = r.peek()
	start := r.at
	switch n.kind {
	case '"':
		n.value, err = r.str()
		return n, err
	case '{', '[':
		for r.at++; r.peek() != n.kind+2; { // '{'+2 is '}', '['+2 is ']'
			var name string
			if n.kind == '{' {
				if name, err = r.str(); err != nil {
					return node{}, err
				}
			}
			kid, err := r.value(depth + 1)
			if err != nil {
				return node{}, err
			}
			kid.name = name
			n.kids = append(n.kids, kid)
		}
		r.at++
	default: // a number, true, false or null
		for r.at < len(r.text) && strings.IndexByte(" \t\r\n,]}", r.text[r.at]) < 0 {
			r.at++
		}
		switch n.kind {
		case 't', 'f':
			n.kind = 't'
		case 'n':
		default:
			n.kind = '0'
		}
	}
	n.value = r.text[start:r.at]
	return n, nil
}

// str reads a string; only one with an escape has to be copied.
func (r *reader) str() (string, error) {
	start := r.at
	plain := true
	for r.at++; r.text[r.at] != '"'; r.at++ {
		if r.text[r.at] == '\\' {
			plain = false
			r.at++
		}
	}
	r.at++
	if plain {
		return r.text[start+1 : r.at-1], nil
	}
	var s string
	err := json.Unmarshal([]byte(r.text[start:r.at]), &s)
	return s, err
}

// fromNode decodes and validates a parsed policy.
func fromNode(n node) (*Policy, error) {
	p := &Policy{}
	if n.kind == '{' && len(n.kids) == 0 {
		p.V = Version // {} is the zero policy
		return p, nil
	}
	if err := decode("", n, reflect.ValueOf(p).Elem()); err != nil {
		return nil, err
	}
	if !slices.ContainsFunc(n.kids, func(m node) bool { return m.name == "v" }) {
		return nil, &FieldError{"v", "missing", fmt.Sprintf(`want "v": %d`, Version)}
	}
	if err := p.validate(); err != nil {
		return nil, err
	}
	for _, ids := range []*[]uint32{&p.Proxy.UIDs, &p.Proxy.GIDs, &p.Outbound.ExceptUIDs} {
		slices.Sort(*ids)
		*ids = slices.Compact(*ids)
	}
	slices.Sort(p.ExceptInterfaces)
	p.ExceptInterfaces = slices.Compact(p.ExceptInterfaces)
	return p, nil
}

// decode stores n, which stands at path, into v. Lists and objects may be null,
// which means empty, as a Go or JavaScript client writes them.
func decode(path string, n node, v reflect.Value) error {
	wrong := func(want string) error { return &FieldError{path, n.text(), "want " + want} }
	switch dst := v.Addr().Interface().(type) {
	case *Ports:
		if n.kind != '"' {
			return wrong(`a string of ports and ranges such as "80,443,9000-9100"`)
		}
		ps, err := ParsePorts(n.value)
		if err != nil {
			return &FieldError{path, n.text(), err.Error()}
		}
		*dst = ps
		return nil
	case *Nets:
		return decodeNets(path, n, dst, wrong)
	}
	switch v.Kind() {
	case reflect.Struct:
		if n.kind == 'n' && path != "" {
			return nil
		}
		if n.kind != '{' {
			return wrong("an object")
		}
		return decodeStruct(path, n, v)
	case reflect.Slice:
		if n.kind == 'n' {
			return nil
		}
		if n.kind != '[' {
			return wrong("a list")
		}
		if len(n.kids) == 0 {
			return nil // no list and an empty one are the same policy
		}
		list := reflect.MakeSlice(v.Type(), len(n.kids), len(n.kids))
		for i, item := range n.kids {
			if err := decode(fmt.Sprintf("%s[%d]", path, i), item, list.Index(i)); err != nil {
				return err
			}
		}
		v.Set(list)
	case reflect.String:
		if n.kind != '"' {
			return wrong("a string")
		}
		v.SetString(n.value)
	case reflect.Bool:
		if n.kind != 't' {
			return wrong("true or false")
		}
		v.SetBool(n.value == "true")
	case reflect.Int:
		i, err := strconv.Atoi(n.value)
		if n.kind != '0' || err != nil {
			return wrong("a whole number")
		}
		v.SetInt(int64(i))
	case reflect.Uint16, reflect.Uint32:
		most := uint64(65535)
		if v.Kind() == reflect.Uint32 {
			most = MaxID
		}
		u, err := strconv.ParseUint(n.value, 10, 64)
		if n.kind != '0' || err != nil || u > most {
			return wrong(fmt.Sprintf("a whole number from 0 to %d", most))
		}
		v.SetUint(u)
	default:
		panic("redirect: policy field of kind " + v.Kind().String())
	}
	return nil
}

func decodeStruct(path string, n node, v reflect.Value) error {
	seen := map[string]bool{}
	for _, m := range n.kids {
		at := m.name
		if at == "" {
			at = `""`
		}
		if path != "" {
			at = path + "." + at
		}
		if seen[m.name] {
			return &FieldError{short(at), m.text(), "given twice; write it once"}
		}
		seen[m.name] = true
		f, known := fieldNamed(v, m.name)
		if !known {
			return &FieldError{short(at), m.text(), "unknown field; this level knows " + strings.Join(fieldNames(v.Type()), ", ")}
		}
		if err := decode(at, m, f); err != nil {
			return err
		}
	}
	return nil
}

func decodeNets(path string, n node, dst *Nets, wrong func(string) error) error {
	if n.kind == 'n' {
		return nil
	}
	if n.kind != '[' {
		return wrong(`a list of CIDRs such as ["10.0.0.0/8"]`)
	}
	nets := slices.Grow(Nets(nil), len(n.kids))
	for i, item := range n.kids {
		at := func() string { return fmt.Sprintf("%s[%d]", path, i) }
		if item.kind != '"' {
			return &FieldError{at(), item.text(), `want a CIDR in a string, such as "10.0.0.0/8" or "fd00::/8"`}
		}
		p, err := ParseCIDR(item.value)
		if err != nil {
			return &FieldError{at(), item.text(), err.Error()}
		}
		nets = append(nets, p)
	}
	*dst = normalNets(nets)
	return nil
}

func jsonName(f reflect.StructField) string {
	name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
	return name
}

func fieldNamed(v reflect.Value, name string) (reflect.Value, bool) {
	for i := range v.NumField() {
		if jsonName(v.Type().Field(i)) == name {
			return v.Field(i), true
		}
	}
	return reflect.Value{}, false
}

func fieldNames(t reflect.Type) []string {
	names := make([]string, t.NumField())
	for i := range names {
		names[i] = jsonName(t.Field(i))
	}
	return names
}

// ParsePorts reads a set of ports: "80,443,9000-9100", blanks around items
// allowed, "" the empty set.
func ParsePorts(s string) (Ports, error) {
	if strings.Trim(s, " \t") == "" {
		return nil, nil
	}
	var ps Ports
	for item := range strings.SplitSeq(s, ",") {
		item = strings.Trim(item, " \t")
		first, last, isRange := strings.Cut(item, "-")
		if !isRange {
			last = first
		}
		a, okA := parsePort(first)
		b, okB := parsePort(last)
		switch {
		case !okA || !okB:
			return nil, fmt.Errorf("item %s: want a port from 1 to 65535 or a range such as 9000-9100", short(strconv.Quote(item)))
		case a > b:
			return nil, fmt.Errorf("item %q: the range is reversed; write %d-%d", item, b, a)
		}
		ps = append(ps, PortRange{a, b})
	}
	return normalPorts(ps), nil
}

func parsePort(s string) (uint16, bool) {
	if len(s) == 0 || len(s) > 5 || s[0] == '0' || strings.Trim(s, "0123456789") != "" {
		return 0, false
	}
	n, err := strconv.ParseUint(s, 10, 16)
	return uint16(n), err == nil
}

func normalPorts(ps Ports) Ports {
	slices.SortFunc(ps, func(a, b PortRange) int {
		return cmp.Or(cmp.Compare(a.First, b.First), cmp.Compare(a.Last, b.Last))
	})
	out := ps[:0]
	for _, r := range ps {
		if k := len(out) - 1; k >= 0 && int(r.First) <= int(out[k].Last)+1 {
			out[k].Last = max(out[k].Last, r.Last)
			continue
		}
		out = append(out, r)
	}
	return out
}

// ParseCIDR reads one network, blanks around it allowed; bits behind the prefix
// are dropped, as in 10.1.2.3/8.
func ParseCIDR(s string) (netip.Prefix, error) {
	s = strings.TrimSpace(s)
	p, err := netip.ParsePrefix(s)
	if err != nil {
		if a, err := netip.ParseAddr(s); err == nil && a.Zone() == "" {
			a = a.Unmap()
			return netip.Prefix{}, fmt.Errorf("want a CIDR; write %s/%d", a, a.BitLen())
		}
		return netip.Prefix{}, errors.New("want a CIDR such as 10.0.0.0/8 or fd00::/8")
	}
	if p.Addr().Is4In6() {
		return netip.Prefix{}, fmt.Errorf("IPv4 in IPv6 notation never matches a packet; write an IPv4 CIDR of %s", p.Addr().Unmap())
	}
	return p.Masked(), nil
}

func normalNets(ns Nets) Nets {
	slices.SortFunc(ns, func(a, b netip.Prefix) int {
		return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
	})
	out := ns[:0]
	for _, n := range ns {
		// Sorted by address, then wider first: what contains n is the last one kept.
		if k := len(out) - 1; k >= 0 && out[k].Overlaps(n) {
			continue
		}
		out = append(out, n)
	}
	return out
}

// validate reports the first thing that is well-formed but cannot be.
func (p *Policy) validate() error {
	if p.V != Version {
		return &FieldError{"v", strconv.Itoa(p.V), fmt.Sprintf("this build knows policy version %d only", Version)}
	}
	if m := p.Inbound.Mode; m != "" && m != ModeRedirect && m != ModeTProxy {
		return &FieldError{"inbound.mode", short(strconv.Quote(string(m))), `want "redirect" or "tproxy"`}
	}
	if m := p.UDP.Mode; m != "" && m != ModeProxyProtocol && m != ModeTProxy {
		return &FieldError{"udp.mode", short(strconv.Quote(string(m))), `want "proxy-protocol" or "tproxy"`}
	}
	for i, name := range p.ExceptInterfaces {
		// The kernel's own rule (dev_valid_name, net/core/dev.c), less the
		// characters that nft and iptables read as wildcards or quotes.
		if name == "" || len(name) > 15 || name == "." || name == ".." ||
			strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r >= 0x7f || strings.ContainsRune(`/:+*"\`, r) }) {
			return &FieldError{fmt.Sprintf("exceptInterfaces[%d]", i), short(strconv.Quote(name)), "want the name of one interface, such as eth1, of at most 15 characters"}
		}
	}
	return nil
}

// short keeps what users wrote readable in an event: 80 bytes at most, on one line.
func short(s string) string {
	const most = 80
	if len(s) > most {
		s = strings.ToValidUTF8(s[:most], "") + "…"
	}
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, s)
}
