package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strings"

	"github.com/preroute/preroute/plugin/backend"
	"github.com/preroute/preroute/plugin/netfilter"
	"github.com/preroute/preroute/plugin/redirect"
	"golang.org/x/sys/unix"
)

// policyEnv is where the pod-side commands read the policy: the downward API
// puts the annotation there.
const policyEnv = "PREROUTE_POLICY"

// newFlags makes the flag set of a command; errors go to stderr.
func newFlags(name, args, what string) *flag.FlagSet {
	fs := flag.NewFlagSet(name, flag.ContinueOnError)
	fs.Usage = func() {
		fmt.Fprintf(fs.Output(), "preroute %s %s\n%s\n", name, args, what)
		fs.PrintDefaults()
	}
	return fs
}

// parseFlags returns whether the command goes on, and its exit code if not.
func parseFlags(fs *flag.FlagSet, args []string) (code int, ok bool) {
	switch err := fs.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		return exitOK, false
	case err != nil:
		return exitUsage, false
	case fs.NArg() > 0:
		return fail(exitUsage, "%s: unknown argument %q", fs.Name(), fs.Arg(0)), false
	}
	return exitOK, true
}

func policyFromEnv() (*redirect.Policy, error) {
	text, ok := os.LookupEnv(policyEnv)
	if !ok {
		return nil, fmt.Errorf("%s is not set; give it the pod's annotation %s", policyEnv, policyAnnotation)
	}
	p, err := redirect.Parse(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", policyEnv, err)
	}
	return p, nil
}

// policyFromFile reads a policy; "-" is stdin, "" the environment.
func policyFromFile(name string) (*redirect.Policy, error) {
	var text []byte
	var err error
	switch name {
	case "":
		return policyFromEnv()
	case "-":
		text, err = io.ReadAll(os.Stdin)
	default:
		text, err = os.ReadFile(name)
	}
	if err != nil {
		return nil, fmt.Errorf("reading the policy: %w", err)
	}
	p, err := redirect.Parse(strings.TrimSpace(string(text)))
	if err != nil {
		return nil, fmt.Errorf("policy %s: %w", name, err)
	}
	return p, nil
}

// runInit applies the policy to the namespace it runs in.
func runInit(args []string) int {
	fs := newFlags("init", "[flags]", "Applies the policy in "+policyEnv+" to the network namespace it runs in.")
	name := fs.String("backend", "auto", "`backend` to use: auto, nft or iptables")
	if code, ok := parseFlags(fs, args); !ok {
		return code
	}
	p, err := policyFromEnv()
	if err != nil {
		return fail(exitUsage, "init: %v", err)
	}
	b, err := backend.Choose(*name)
	if err != nil {
		return fail(exitUsage, "init: %v", err)
	}
	if isInitialNetNS() {
		return fail(exitFailed, "init: this is the host's own network namespace; a pod with hostNetwork cannot be redirected")
	}
	changed, err := b.Apply(current, p)
	if err != nil {
		return fail(exitFailed, "init: redirecting the pod: %v", err)
	}
	if !changed {
		fmt.Printf("preroute: init: this policy is already in place (%s)\n", b.Name())
		return exitOK
	}
	fmt.Printf("preroute: init: redirected by %s%s\n", b.Name(), because(b.Reason))
	return exitOK
}

func because(reason string) string {
	if reason == "" {
		return ""
	}
	return ", since " + reason
}

// runCheck compares what is in place with a policy.
func runCheck(args []string) int {
	fs := newFlags("check", "[flags]", "Compares what is in place with a policy, and prints the first difference first.")
	file := fs.String("policy", "", "`file` that holds the policy, - for stdin (default: "+policyEnv+")")
	path := fs.String("netns", "", "`path` of the network namespace (default: the one it runs in)")
	name := fs.String("backend", "auto", "`backend` to use: auto, nft or iptables")
	if code, ok := parseFlags(fs, args); !ok {
		return code
	}
	p, err := policyFromFile(*file)
	if err != nil {
		return fail(exitUsage, "check: %v", err)
	}
	b, err := backend.Choose(*name)
	if err != nil {
		return fail(exitUsage, "check: %v", err)
	}
	ns := current
	if *path != "" {
		if ns, err = unix.Open(*path, unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
			return fail(exitUsage, "check: opening network namespace %s: %v", *path, err)
		}
		defer unix.Close(ns)
	}
	code := exitOK
	err = b.Check(ns, p)
	var diff *netfilter.Difference
	switch {
	case err == nil:
		fmt.Println("in place: the namespace is as the policy says")
	case errors.As(err, &diff):
		fmt.Printf("differs: %v\n", diff)
		code = exitFailed
	default:
		return fail(exitFailed, "check: %v", err)
	}
	fmt.Printf("backend: %s%s\n", b.Name(), because(b.Reason))
	fmt.Printf("policy: %s\n", p)
	if b.Name() == (netfilter.NFT{}).Name() {
		counters, err := netfilter.NFT{}.Counters(ns)
		if err != nil {
			return fail(exitFailed, "check: %v", err)
		}
		printCounters(counters)
	}
	return code
}

func printCounters(counters []netfilter.Counter) {
	chain := ""
	for _, c := range counters {
		if c.Chain != chain {
			chain = c.Chain
			fmt.Printf("%s:  (connections, or packets where every packet is looked at)\n", chain)
		}
		fmt.Printf("  %8d  %s\n", c.Packets, c.Rule)
	}
}

// runExplain says what a policy does to one connection.
func runExplain(args []string) int {
	fs := newFlags("explain", "--policy FILE --to ADDR:PORT [flags]",
		"Says what happens to a connection, and by which rule. With --uid or --gid, or without --from, it is one that a\n"+
			"process in the pod opens; with --from alone, or --inbound, one that arrives from outside.")
	file := fs.String("policy", "", "`file` that holds the policy, - for stdin (default: "+policyEnv+")")
	to := fs.String("to", "", "destination, `address:port`")
	from := fs.String("from", "", "source, `address[:port]`")
	uid := fs.Uint64("uid", 0, "`UID` of the process that opens the connection")
	gid := fs.Uint64("gid", 0, "`GID` of the process that opens the connection")
	udp := fs.Bool("udp", false, "a UDP datagram rather than a TCP connection")
	inbound := fs.Bool("inbound", false, "the connection arrives from outside the pod")
	iface := fs.String("interface", "", "`name` of the interface it leaves by or arrives at")
	own := fs.String("own", "", "the pod's own `addresses`, separated by commas (inbound: --to is one)")
	if code, ok := parseFlags(fs, args); !ok {
		return code
	}
	p, err := policyFromFile(*file)
	if err != nil {
		return fail(exitUsage, "explain: %v", err)
	}
	set := map[string]bool{}
	fs.Visit(func(f *flag.Flag) { set[f.Name] = true })
	c := redirect.Conn{Proto: redirect.ProtoTCP, Chain: redirect.ChainOutput, Interface: *iface, UID: uint32(*uid), GID: uint32(*gid)}
	if *uid > redirect.MaxID || *gid > redirect.MaxID {
		return fail(exitUsage, "explain: a UID or GID is a number from 0 to %d", redirect.MaxID)
	}
	if c.Dst, err = netip.ParseAddrPort(*to); err != nil {
		return fail(exitUsage, "explain: --to %q: want address:port, such as 10.0.0.9:443 or [fd00::9]:443", *to)
	}
	if c.Src, err = parseSource(*from, c.Dst.Addr()); err != nil {
		return fail(exitUsage, "explain: %v", err)
	}
	for item := range strings.SplitSeq(*own, ",") {
		if item = strings.TrimSpace(item); item == "" {
			continue
		}
		a, err := netip.ParseAddr(item)
		if err != nil {
			return fail(exitUsage, "explain: --own %q: want addresses separated by commas", item)
		}
		c.Own = append(c.Own, a)
	}
	if *udp {
		c.Proto = redirect.ProtoUDP
	}
	if *inbound || set["from"] && !set["uid"] && !set["gid"] {
		c.Chain, c.Own = redirect.ChainPrerouting, append(c.Own, c.Dst.Addr())
	}
	fmt.Println(describeConn(c, set) + " " + redirect.Decide(p.Rules(), c).String() + ".")
	return exitOK
}

// parseSource reads --from; without one it is an address of the destination's
// family that no rule names.
func parseSource(from string, dst netip.Addr) (netip.AddrPort, error) {
	if from == "" {
		if dst.Is4() {
			return netip.AddrPortFrom(netip.IPv4Unspecified(), 0), nil
		}
		return netip.AddrPortFrom(netip.IPv6Unspecified(), 0), nil
	}
	if ap, err := netip.ParseAddrPort(from); err == nil {
		return ap, nil
	}
	a, err := netip.ParseAddr(from)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("--from %q: want an address, or address:port", from)
	}
	return netip.AddrPortFrom(a, 0), nil
}

func describeConn(c redirect.Conn, set map[string]bool) string {
	what := "A TCP connection"
	if c.Proto == redirect.ProtoUDP {
		what = "A UDP datagram"
	}
	if c.Chain == redirect.ChainPrerouting {
		what += " from outside"
		if set["from"] {
			what += ", from " + c.Src.Addr().String() + ","
		}
		return what + " to the pod's " + c.Dst.String()
	}
	what += fmt.Sprintf(" of uid %d", c.UID)
	if set["gid"] {
		what += fmt.Sprintf(" and gid %d", c.GID)
	}
	return what + " in the pod to " + c.Dst.String()
}
