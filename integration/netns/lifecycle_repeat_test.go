package netns_test

import (
	"fmt"
	"regexp"
	"strings"
	"testing"
)

// L2 and L3: again, differently, and beside the rules of others.

var lifePolicies = []struct{ name, text string }{
	{"none", policyNone}, {"nginx", policyNGINX}, {"kuma", policyKuma}, {"tproxy", policyTProxy},
}

func TestAppliedTwiceChangesNothing(t *testing.T) {
	for _, f := range flavours() {
		for _, pol := range lifePolicies {
			t.Run(f.name+" "+pol.name, func(t *testing.T) {
				p := bare(t)
				p.mustAdd(pol.text, using(f))
				first := p.exact()
				p.mustAdd(pol.text, using(f))
				same(t, "the second ADD changed something", p.exact(), first)
				if err := p.check(pol.text, using(f)).err(); err != nil {
					t.Errorf("CHECK: %v", err)
				}
				same(t, "CHECK changed something", p.exact(), first)
			})
		}
	}
}

// TestAnotherPolicyLeavesThatOne goes from every policy to every other, in every
// flavour, and from flavour to flavour.
func TestAnotherPolicyLeavesThatOne(t *testing.T) {
	fresh := map[string]string{}
	for _, f := range flavours() {
		for _, pol := range lifePolicies {
			fresh[f.name+" "+pol.name] = freshly(t, pol.text, using(f))
		}
	}
	untouched := shape(bare(t).exact())
	for _, f := range flavours() {
		t.Run(f.name, func(t *testing.T) {
			p := bare(t)
			for _, from := range lifePolicies {
				for _, to := range lifePolicies {
					p.mustAdd(from.text, using(f))
					p.mustAdd(to.text, using(f))
					want := fresh[f.name+" "+to.name]
					if to.text == policyNone && f.name == "nft" {
						want = untouched
					}
					same(t, from.name+", then "+to.name, shape(p.exact()), want)
				}
			}
		})
	}
	for _, from := range flavours() {
		for _, to := range flavours() {
			if from == to {
				continue
			}
			t.Run("from "+from.name+" to "+to.name, func(t *testing.T) {
				p := bare(t)
				p.mustAdd(policyKuma, using(from))
				p.mustAdd(policyNGINX, using(to))
				if err := p.check(policyNGINX, using(to)).err(); err != nil {
					t.Errorf("CHECK: %v", err)
				}
				same(t, "what is Preroute's", withoutNotes(ours(p.exact())), withoutNotes(ours(fresh[to.name+" nginx"])))
				p.mustAdd(policyNone, using(to))
				if left := ours(p.exact()); left != ours(untouched) {
					t.Errorf("after removal there is still\n%s", left)
				}
			})
		}
	}
}

var ourLine = regexp.MustCompile(`PREROUTE_|\b28786\b|(^| )::6[ /]`)

// ours are the lines of an exact text that are Preroute's, roughly: the whole
// table inet preroute, and what names our chains, marks, table or addresses.
func ours(exact string) string {
	var b strings.Builder
	inTable := false
	for line := range strings.Lines(shape(exact)) {
		inTable = inTable || strings.HasPrefix(line, "table inet preroute {")
		if inTable || ourLine.MatchString(line) {
			b.WriteString(line)
		}
		inTable = inTable && line != "}\n"
	}
	return b.String()
}

// foreignSetup makes rules of others: in every nft family, with names near to
// ours; in both flavours of iptables; and in the policy routing.
const foreignSetup = `
nft -f - <<'END'
table inet mesh {
	comment "somebody else's"
	counter hits { packets 7 bytes 700 }
	set ports { type inet_service; flags interval; elements = { 80, 9000-9100 } }
	map uids { type uid : verdict; elements = { 1000 : accept } }
	chain output { type nat hook output priority -100; policy accept; tcp dport @ports counter packets 5 bytes 300 accept; meta skuid vmap @uids; }
	chain prerouting { type filter hook prerouting priority mangle; policy accept; counter name hits; }
}
table inet preroute2 { chain output { type filter hook output priority 0; policy accept; }; }
table ip preroute { chain output { type nat hook output priority -101; policy accept; oifname "none0" return; }; }
table ip6 preroute { chain PREROUTE { counter packets 1 bytes 2; }; }
table arp other { chain input { type filter hook input priority 0; policy accept; }; }
table bridge other { chain forward { type filter hook forward priority 0; policy accept; }; }
table netdev other { chain ingress { type filter hook ingress device lo priority 0; policy accept; }; }
END
for iptables in iptables-nft ip6tables-nft iptables-legacy ip6tables-legacy; do
	$iptables -w -t nat -N CNI-HOSTPORT
	$iptables -w -t nat -A CNI-HOSTPORT -p tcp --dport 8080 -j REDIRECT --to-ports 80
	$iptables -w -t nat -A OUTPUT -m owner --uid-owner 77 -j RETURN
	$iptables -w -t nat -A PREROUTING -c 3 180 -p tcp --dport 99 -j CNI-HOSTPORT
	$iptables -w -t mangle -A PREROUTING -p udp -j MARK --set-mark 0x4000
	$iptables -w -t raw -A OUTPUT -p udp --dport 99 -j CT --zone 9
	$iptables -w -t filter -P FORWARD DROP
done
for family in -4 -6; do
	ip $family rule add fwmark 0x4000 lookup 133 priority 1000
	ip $family rule add fwmark 0x1000000/0x1000000 lookup 134 priority 28785
	ip $family route add local default dev lo table 133
	ip $family route add unreachable default table 134
done
ip address add 127.0.0.7/32 dev lo
ip address add fd00:99::1/128 dev lo nodad
`

func TestForeignRulesAreLeftAlone(t *testing.T) {
	for _, f := range flavours() {
		t.Run(f.name, func(t *testing.T) {
			p := bare(t)
			p.exec("sh", "-euc", foreignSetup)
			before := p.exact()
			foreign := theirs(before)
			for i, pol := range []string{policyNGINX, policyNGINX, policyKuma, policyTProxy} {
				p.mustAdd(pol, using(f))
				same(t, fmt.Sprintf("rules of others after ADD %d", i+1), theirs(p.exact()), foreign)
				if err := p.check(pol, using(f)).err(); err != nil {
					t.Errorf("CHECK beside the rules of others: %v", err)
				}
			}
			p.mustAdd(policyNone, using(f))
			if f.name == "nft" {
				same(t, "after removal", p.exact(), before)
			}
			same(t, "rules of others after removal", theirs(p.exact()), foreign)
			if left := ours(p.exact()); left != "" {
				t.Errorf("after removal there is still\n%s", left)
			}
		})
	}
}

var note = regexp.MustCompile(` -m comment --comment "preroute made [^"]*"`)

// withoutNotes takes out by whom the chain that a jump stands in was made, which
// nobody can know once the jump was gone.
func withoutNotes(shape string) string { return note.ReplaceAllString(shape, "") }

// theirs is an exact text without what is Preroute's. Chains and tables of
// iptables that exist by default and are empty belong to nobody.
func theirs(exact string) string {
	var b strings.Builder
	inTable := false
	for line := range strings.Lines(exact) {
		inTable = inTable || strings.HasPrefix(line, "table inet preroute {")
		if !inTable && !ourLine.MatchString(line) {
			b.WriteString(line)
		}
		inTable = inTable && line != "}\n"
	}
	return b.String()
}
