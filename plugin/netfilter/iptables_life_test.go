package netfilter

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/coreos/go-iptables/iptables"
	"github.com/preroute/preroute/plugin/redirect"
	"golang.org/x/sys/unix"
)

const (
	redirectPolicy = `{"v":1,"proxy":{"uids":[2102]},"inbound":{"port":8901,"exceptPorts":"8887"},"outbound":{"port":8900,"exceptPorts":"53"}}`
	tproxyPolicy   = `{"v":1,"proxy":{"uids":[1337],"hairpin":true},"inbound":{"port":15006,"mode":"tproxy"},"outbound":{"port":15001},"dns":{"port":15053}}`
)

func apply(t *testing.T, b *IPTables, ns int, p *redirect.Policy) {
	t.Helper()
	if changed, err := b.Apply(ns, p); err != nil || !changed {
		t.Fatalf("Apply: changed=%v, %v", changed, err)
	}
	if err := b.Check(ns, p); err != nil {
		t.Fatalf("Check: %v", err)
	}
}

// foreign fills a namespace with rules of others, in every table that we use and
// in filter, in one flavour.
func foreign(t *testing.T, ns int, f flavour) {
	t.Helper()
	const rules = `*raw
:FOREIGN - [0:0]
-A OUTPUT -p udp -m udp --dport 9 -m comment --comment "somebody's; \"quoted\"" -j FOREIGN
-A FOREIGN -j NOTRACK
COMMIT
*mangle
-A PREROUTING -p tcp -m tcp --dport 99 -j MARK --set-xmark 0x1/0xff
-A OUTPUT -p tcp -m tcp --dport 99 -j MARK --set-xmark 0x1/0xff
COMMIT
*nat
:FOREIGN - [0:0]
-A PREROUTING -p tcp -m tcp --dport 77 -j REDIRECT --to-ports 78
-A OUTPUT -p tcp -m tcp --dport 77 -j FOREIGN
-A POSTROUTING -o eth9 -j MASQUERADE
-A FOREIGN -j ACCEPT
COMMIT
*filter
:FORWARD DROP [0:0]
-A INPUT -p tcp -m tcp --dport 66 -j DROP
COMMIT
`
	for _, base := range []string{"iptables-", "ip6tables-"} {
		feed(t, ns, rules, base+string(f)+"-restore", "--noflush")
	}
}

// feed runs a program in the namespace with a standard input.
func feed(t *testing.T, ns int, input string, args ...string) {
	t.Helper()
	err := inNamespace(ns, 0, func(*os.File) error {
		cmd := exec.Command(args[0], args[1:]...)
		cmd.Stdin = strings.NewReader(input)
		cmd.Env = append(os.Environ(), "XTABLES_LOCKFILE=/dev/fd/0")
		out, err := cmd.CombinedOutput()
		if err != nil {
			return fmt.Errorf("%v: %w\n%s", args, err, out)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// withoutOurs is a listing less the lines that speak of our chains.
func withoutOurs(s string) string {
	return regexp.MustCompile(`(?m)^.*PREROUTE_.*\n`).ReplaceAllString(s, "")
}

// Rules of others, in the tables we use and in others, in our flavour and in the
// other one and in nftables, stay as they are: with our rules, with other rules
// of ours, and after them.
func TestIPTablesKeepsForeignRules(t *testing.T) {
	eachFlavour(t, func(t *testing.T, b *IPTables, f flavour) {
		ns, run := newNS(t)
		foreign(t, ns, flavourNft)
		foreign(t, ns, flavourLegacy)
		run("nft", "add table inet somebody; add chain inet somebody out { type nat hook output priority -90; }; add rule inet somebody out tcp dport 55 redirect to :56")
		show := func() string {
			return saved(run, flavourNft) + saved(run, flavourLegacy) + run("nft", "list table inet somebody")
		}
		before, ruleset := show(), run("nft", "list ruleset")
		for _, text := range []string{redirectPolicy, tproxyPolicy, redirectPolicy} {
			apply(t, b, ns, parse(t, text))
			if got := withoutOurs(show()); got != before {
				t.Fatalf("with policy %s the rules of others are\n%s\nnot\n%s", text, got, before)
			}
		}
		if err := b.Remove(ns); err != nil {
			t.Fatal(err)
		}
		if got := show(); got != before {
			t.Errorf("after removal:\n%s\nnot\n%s", got, before)
		}
		if got := run("nft", "list ruleset"); got != ruleset {
			t.Errorf("after removal:\n%s\nnot\n%s", got, ruleset)
		}
	})
}

// Another policy leaves exactly that one: as if it had been the first.
func TestIPTablesAnotherPolicy(t *testing.T) {
	policies := goldenPolicies(t)
	names := []string{"tproxy", "contract", "long-lists", "tproxy-hairpin", "inbound-only", "dns-only", "tproxy", "excepts", "outbound-only"}
	eachFlavour(t, func(t *testing.T, b *IPTables, f flavour) {
		ns, run := newNS(t)
		for _, name := range names {
			apply(t, b, ns, policies[name])
			fresh, runFresh := newNS(t)
			apply(t, b, fresh, policies[name])
			if got, want := ourLines(run, f), ourLines(runFresh, f); !slices.Equal(got, want) {
				t.Errorf("after another policy, %s is\n%s\nnot\n%s", name, strings.Join(got, "\n"), strings.Join(want, "\n"))
			}
			if f == flavourNft {
				if got, want := run("nft", "list", "tables"), runFresh("nft", "list", "tables"); len(got) != len(want) {
					t.Errorf("after another policy, the tables of %s are\n%s\nnot\n%s", name, got, want)
				}
			}
			if got, want := run("ip", "rule")+run("ip", "-6", "rule"), runFresh("ip", "rule")+runFresh("ip", "-6", "rule"); got != want {
				t.Errorf("after another policy, the policy routing of %s is\n%s\nnot\n%s", name, got, want)
			}
		}
	})
}

// ourLines are the lines of both families that speak of our chains, each chain's
// in their order, without what tells tables and chains of different age apart.
func ourLines(run func(...string) string, f flavour) []string {
	byChain := map[string][]string{}
	for _, family := range []string{"iptables-", "ip6tables-"} {
		var table string
		for line := range strings.Lines(save(run, family, f)) {
			line = strings.TrimSpace(line)
			if strings.HasPrefix(line, "*") {
				table = line
			}
			if strings.Contains(line, chainPrefix) {
				line = regexp.MustCompile(`-m comment --comment "preroute made [a-z ]*" |\[.*\]`).ReplaceAllString(line, "")
				key := family + table + strings.Fields(line)[1]
				byChain[key] = append(byChain[key], line)
			}
		}
	}
	var out []string
	for _, key := range slices.Sorted(maps.Keys(byChain)) {
		out = append(out, key)
		out = append(out, byChain[key]...)
	}
	return out
}

// In the nft flavour chains and tables come and go. Those that were there before
// us stay, those that somebody uses by now too.
func TestIPTablesNftBaseChains(t *testing.T) {
	b := flavoured(t, flavourNft)
	p := parse(t, redirectPolicy)

	t.Run("chains of before us stay", func(t *testing.T) {
		ns, run := newNS(t)
		run("nft", "add table ip nat; add chain ip nat OUTPUT { type nat hook output priority -100; }; add table ip6 nat")
		before := run("nft", "list ruleset")
		apply(t, b, ns, p)
		apply(t, b, ns, parse(t, tproxyPolicy))
		apply(t, b, ns, p)
		if err := b.Remove(ns); err != nil {
			t.Fatal(err)
		}
		if got := run("nft", "list ruleset"); got != before {
			t.Errorf("after removal:\n%s\nnot\n%s", got, before)
		}
	})
	t.Run("chains in use stay", func(t *testing.T) {
		ns, run := newNS(t)
		apply(t, b, ns, p)
		run("iptables-nft", "-t", "nat", "-A", "OUTPUT", "-p", "tcp", "--dport", "77", "-j", "ACCEPT")
		if err := b.Remove(ns); err != nil {
			t.Fatal(err)
		}
		want := "table ip nat { chain OUTPUT { type nat hook output priority -100; policy accept; tcp dport 77 counter packets 0 bytes 0 accept } } "
		if got := squeeze(run("nft", "list ruleset")); got != want {
			t.Errorf("after removal:\n%s\nnot\n%s", got, want)
		}
	})
}

// An error in one family, when the other and even a table of this one have been
// written, leaves all as it was.
func TestIPTablesRollsBack(t *testing.T) {
	eachFlavour(t, func(t *testing.T, b *IPTables, f flavour) {
		for _, base := range []string{"iptables-", "ip6tables-"} {
			for name, first := range map[string]string{"nothing before": "", "a policy before": redirectPolicy} {
				t.Run(base+name, func(t *testing.T) {
					ns, run := newNS(t)
					foreign(t, ns, f)
					if first != "" {
						apply(t, b, ns, parse(t, first))
						// Not the first in its chain, and to be found there again.
						run("iptables-"+string(f), "-t", "nat", "-I", "PREROUTING", "-p", "tcp", "--dport", "1", "-j", "ACCEPT")
					}
					show := func() string {
						chains := strings.Split(run("nft", "list", "chains"), "\n")
						slices.Sort(chains) // nft lists them by age
						return saved(run, f) + strings.Join(chains, "\n") + run("ip", "rule") + run("ip", "-6", "rule")
					}
					before := show()

					program := base + string(f) + "-restore"
					dir := t.TempDir()
					script := fmt.Sprintf(`#!/bin/sh
if mkdir %[1]s/once 2>/dev/null; then
	sed /COMMIT/q | %[2]s "$@"
	echo "%[2]s: line 2 failed: a disk full of rules" >&2
	exit 1
fi
exec %[2]s "$@"
`, dir, "/usr/sbin/"+program)
					if err := os.WriteFile(filepath.Join(dir, program), []byte(script), 0o755); err != nil {
						t.Fatal(err)
					}
					broken := &IPTables{path: dir + ":" + b.path}
					changed, err := broken.Apply(ns, parse(t, tproxyPolicy))
					if err == nil || changed || !strings.Contains(err.Error(), "a disk full of rules") {
						t.Fatalf("Apply with a broken %s: changed=%v, %v", program, changed, err)
					}
					if got := show(); got != before {
						t.Errorf("after the error:\n%s\nnot\n%s", got, before)
					}
				})
			}
		}
	})
}

// Once there are rules of ours in one flavour, they stay in that flavour, whatever
// the machine's iptables is; and where somebody has doubled them, one copy goes.
// (A peer's second run switched flavours and doubled the rules.)
func TestIPTablesNeverInBothFlavours(t *testing.T) {
	all := NewIPTables()
	p := parse(t, tproxyPolicy)
	for _, f := range []flavour{flavourNft, flavourLegacy} {
		t.Run(string(f), func(t *testing.T) {
			ns, run := newNS(t)
			apply(t, flavoured(t, f), ns, p)
			if changed, err := all.Apply(ns, p); err != nil || changed {
				t.Errorf("Apply with both flavours at hand: changed=%v, %v", changed, err)
			}
			other := flavourNft
			if f == flavourNft {
				other = flavourLegacy
			}
			feed(t, ns, RestoreInput(p, true), "iptables-"+string(other)+"-restore", "--noflush")
			var d *Difference
			if err := all.Check(ns, p); !errors.As(err, &d) {
				t.Errorf("Check of doubled rules: %v", err)
			}
			apply(t, all, ns, p)
			if a, b := strings.Contains(saved(run, flavourNft), chainPrefix), strings.Contains(saved(run, flavourLegacy), chainPrefix); a == b {
				t.Errorf("rules in nft: %v, in legacy: %v", a, b)
			}
			if there, err := all.Present(ns); err != nil || !there {
				t.Errorf("Present: %v, %v", there, err)
			}
			if err := all.Remove(ns); err != nil {
				t.Fatal(err)
			}
			if there, err := all.Present(ns); err != nil || there {
				t.Errorf("Present after removal: %v, %v", there, err)
			}
		})
	}
}

// Where others have rules in legacy tables, ours go there too.
func TestIPTablesFollowsForeignLegacyRules(t *testing.T) {
	ns, run := newNS(t)
	foreign(t, ns, flavourLegacy)
	apply(t, NewIPTables(), ns, parse(t, redirectPolicy))
	if got := run("nft", "list", "ruleset"); strings.Contains(got, chainPrefix) {
		t.Errorf("rules in nft:\n%s", got)
	}
}

// Looking makes nothing: no legacy table, no nft table.
func TestIPTablesLooksWithoutATrace(t *testing.T) {
	ns, run := newNS(t)
	b := NewIPTables()
	if there, err := b.Present(ns); err != nil || there {
		t.Errorf("Present: %v, %v", there, err)
	}
	var d *Difference
	if err := b.Check(ns, parse(t, redirectPolicy)); !errors.As(err, &d) || d.Have != "" {
		t.Errorf("Check: %v", err)
	}
	if err := b.Check(ns, &redirect.Policy{V: 1}); err != nil {
		t.Errorf("Check against no policy: %v", err)
	}
	if err := b.Remove(ns); err != nil {
		t.Error(err)
	}
	if changed, err := b.Apply(ns, &redirect.Policy{V: 1}); err != nil || changed {
		t.Errorf("Apply of no policy: changed=%v, %v", changed, err)
	}
	if got := run("cat", "/proc/net/ip_tables_names", "/proc/net/ip6_tables_names") + run("nft", "list", "ruleset"); got != "" {
		t.Errorf("it made %s", got)
	}
}

// What was tampered with is found and named, and mended.
func TestIPTablesCheckNamesTheFirstDifference(t *testing.T) {
	eachFlavour(t, func(t *testing.T, b *IPTables, f flavour) {
		p := parse(t, redirectPolicy)
		for _, tc := range []struct{ tamper, want string }{
			{"-D PREROUTE_INBOUND 1", "IPv4, table nat, chain PREROUTE_INBOUND, rule 1: want: -A PREROUTE_INBOUND -p tcp -m tcp --dport 8901 -m comment"},
			{"-A PREROUTE_OUTPUT -j ACCEPT", "chain PREROUTE_OUTPUT, rule 8: not of this policy: -A PREROUTE_OUTPUT -j ACCEPT"},
			{"-I PREROUTE_OUTPUT -j ACCEPT", "chain PREROUTE_OUTPUT, rule 1: want: "},
			{"-I OUTPUT -j PREROUTE_OUTPUT", "table nat: not of this policy: -A OUTPUT"},
			{"-F OUTPUT", "table nat: missing: -A OUTPUT -j PREROUTE_OUTPUT"},
			{"-N PREROUTE_OLD", "table nat: not of this policy: chain PREROUTE_OLD"},
		} {
			ns, run := newNS(t)
			apply(t, b, ns, p)
			run(slices.Concat([]string{"iptables-" + string(f), "-t", "nat"}, strings.Fields(tc.tamper))...)
			var d *Difference
			if err := b.Check(ns, p); !errors.As(err, &d) || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("Check after %s: %v; want %s", tc.tamper, err, tc.want)
			}
			apply(t, b, ns, p)
		}
	})
}

// Somebody holds the machine's lock, as iptables -w or a stuck program does.
// (In peers every ADD then waits 30 s.)
func TestIPTablesDoesNotWaitForTheMachinesLock(t *testing.T) {
	lock, err := os.OpenFile("/run/xtables.lock", os.O_CREATE|os.O_RDONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	eachFlavour(t, func(t *testing.T, b *IPTables, f flavour) {
		ns, _ := newNS(t)
		// iptables-restore -w 5 would fail.
		apply(t, b, ns, parse(t, tproxyPolicy))
		if err := b.Remove(ns); err != nil {
			t.Error(err)
		}
	})
}

// A thousand networks and ports are more than a pipe holds.
func TestIPTablesThousandExceptions(t *testing.T) {
	var ports, nets []string
	for i := range 1000 {
		ports = append(ports, strconv.Itoa(1000+2*i))
		nets = append(nets, fmt.Sprintf(`"10.%d.%d.0/25","fd00:%x::/33"`, i/250, i%250, i))
	}
	p := parse(t, fmt.Sprintf(`{"v":1,"outbound":{"port":8900,"exceptPorts":%q,"exceptNets":[%s]}}`, strings.Join(ports, ","), strings.Join(nets, ",")))
	eachFlavour(t, func(t *testing.T, b *IPTables, f flavour) {
		ns, _ := newNS(t)
		apply(t, b, ns, p)
	})
}

// go-iptables, which is not our reader, sees the jumps exactly once however often
// policies were applied.
func TestIPTablesJumpsOnce(t *testing.T) {
	eachFlavour(t, func(t *testing.T, b *IPTables, f flavour) {
		ns, _ := newNS(t)
		for range 3 {
			apply(t, b, ns, parse(t, tproxyPolicy))
			apply(t, b, ns, parse(t, redirectPolicy))
		}
		err := inNamespace(ns, 0, func(*os.File) error {
			for proto, program := range map[iptables.Protocol]string{iptables.ProtocolIPv4: "iptables-", iptables.ProtocolIPv6: "ip6tables-"} {
				ipt, err := iptables.New(iptables.IPFamily(proto), iptables.Path("/usr/sbin/"+program+string(f)))
				if err != nil {
					return err
				}
				for _, builtin := range []string{"OUTPUT", "PREROUTING"} {
					lines, err := ipt.List("nat", builtin)
					if err != nil {
						return err
					}
					if n := strings.Count(strings.Join(lines, "\n"), "-j "+chainPrefix+builtin); n != 1 || len(lines) != 2 {
						t.Errorf("%s has %d jumps: %q", builtin, n, lines)
					}
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	})
}
