package redirect

import (
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"
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
