package netns_test

import (
	"fmt"
	"strings"
	"sync"
	"testing"
)

// The life cycle of policies and pods that are unusual, but allowed.

// policyEdges has a set of every kind that begins or ends where numbers do.
const policyEdges = `{"v":1,"proxy":{"uids":[0,4294967294],"gids":[0,4294967294]},` +
	`"inbound":{"port":65535,"ports":"1-65535","exceptPorts":"1,65534","exceptSources":["0.0.0.0/32","255.255.255.255/32","128.0.0.0/1","::/128","8000::/1","ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff/128"]},` +
	`"outbound":{"port":1,"ports":"1,3-65535","exceptPorts":"65535","nets":["0.0.0.0/0","::/0"],"exceptNets":["0.0.0.0/1","10.0.0.0/9","10.128.0.0/9","::/1"],"exceptUIDs":[0,4294967294]},` +
	`"dns":{"port":65534},"exceptInterfaces":["a","fifteen-chars-x","eth0.100","net1@x"]}`

// policyHuge has more exceptions than fit one netlink message.
func policyHuge() string {
	var ports, nets strings.Builder
	for i := range 1500 {
		if i > 0 {
			ports.WriteString(",")
			nets.WriteString(",")
		}
		fmt.Fprintf(&ports, "%d", 2000+2*i)
		if i%2 == 0 {
			fmt.Fprintf(&nets, `"10.%d.%d.0/28"`, i/250, i%250)
		} else {
			fmt.Fprintf(&nets, `"fd00:%x::/48"`, 2*i)
		}
	}
	return fmt.Sprintf(`{"v":1,"proxy":{"uids":[2102]},"inbound":{"port":8901,"exceptPorts":"%s","exceptSources":[%s]},"outbound":{"port":8900,"exceptPorts":"%[1]s","exceptNets":[%[2]s]}}`, &ports, &nets)
}

func TestUnusualPolicies(t *testing.T) {
	for _, f := range flavours() {
		for name, policy := range map[string]string{
			"edges":               policyEdges,
			"huge":                policyHuge(),
			"doubles":             `{"v":1,"proxy":{"uids":[7,7,7],"gids":[7,7]},"outbound":{"port":8900,"exceptUIDs":[1,1],"exceptPorts":"80,80,79-81","exceptNets":["10.0.0.0/8","10.0.0.0/8","10.1.0.0/16"]},"exceptInterfaces":["eth1","eth1"]}`,
			"nobody's proxy":      `{"v":1,"inbound":{"port":8901}}`,
			"DNS alone":           `{"v":1,"proxy":{"uids":[2102]},"dns":{"port":15053}}`,
			"outbound alone":      `{"v":1,"proxy":{"gids":[2102],"hairpin":true},"outbound":{"port":8900}}`,
			"networks of IPv6":    `{"v":1,"proxy":{"uids":[2102]},"outbound":{"port":8900,"nets":["fd00::/8"]}}`,
			"networks of IPv4":    `{"v":1,"proxy":{"uids":[2102]},"outbound":{"port":8900,"nets":["10.0.0.0/8"],"exceptNets":["10.1.0.0/16"]}}`,
			"tproxy and DNS":      `{"v":1,"proxy":{"uids":[2102],"hairpin":true},"inbound":{"port":8901,"mode":"tproxy","exceptSources":["fd00::/8"]},"dns":{"port":15053}}`,
			"every port excepted": `{"v":1,"proxy":{"uids":[2102]},"inbound":{"port":8901,"exceptPorts":"1-65535"},"outbound":{"port":8900,"exceptPorts":"1-65535"}}`,
		} {
			t.Run(f.name+" "+name, func(t *testing.T) {
				p := bare(t)
				p.mustAdd(policy, using(f))
				first := p.exact()
				if err := p.check(policy, using(f)).err(); err != nil {
					t.Errorf("CHECK: %v", err)
				}
				p.mustAdd(policy, using(f))
				same(t, "the second ADD changed something", p.exact(), first)
				p.mustAdd(policyNGINX, using(f))
				same(t, "another policy after it", ours(p.exact()), ours(freshly(t, policyNGINX, using(f))))
				p.mustAdd(policyNone, using(f))
				if left := ours(p.exact()); left != "" {
					t.Errorf("after removal there is still\n%s", left)
				}
			})
		}
	}
}

// TestPodWithoutIPv6 has IPv6 switched off while the policy is applied.
func TestPodWithoutIPv6(t *testing.T) {
	for _, f := range flavours() {
		for _, pol := range lifePolicies {
			t.Run(f.name+" "+pol.name, func(t *testing.T) {
				p := bare(t)
				for _, dev := range []string{"all", "default", "lo"} {
					p.sysctl("net/ipv6/conf/"+dev+"/disable_ipv6", "1")
				}
				for range 2 {
					p.mustAdd(pol.text, using(f))
					if err := p.check(pol.text, using(f)).err(); err != nil {
						t.Errorf("CHECK: %v", err)
					}
				}
				p.mustAdd(policyNone, using(f))
				if left := ours(p.exact()); left != "" {
					t.Errorf("after removal there is still\n%s", left)
				}
			})
		}
	}
}

// TestLoDown has a namespace as the kernel makes it: nothing is up yet.
func TestLoDown(t *testing.T) {
	for _, pol := range lifePolicies[1:] {
		p := bare(t)
		p.exec("ip", "link", "set", "lo", "down")
		for range 2 {
			p.mustAdd(pol.text)
			if err := p.check(pol.text).err(); err != nil {
				t.Errorf("%s: CHECK: %v", pol.name, err)
			}
		}
		p.exec("ip", "link", "set", "lo", "up")
		if err := p.check(pol.text).err(); err != nil {
			t.Errorf("%s: CHECK after lo came up: %v", pol.name, err)
		}
	}
}

// TestTableOfOurNameIsReplaced finds something else under the name of our table.
func TestTableOfOurNameIsReplaced(t *testing.T) {
	p := bare(t)
	p.exec("nft", "add table inet preroute; add set inet preroute s { type inet_service; }; add map inet preroute m { type ipv4_addr : verdict; }; "+
		"add chain inet preroute output; add chain inet preroute other { type filter hook input priority 0; policy drop; }; "+
		"add rule inet preroute output tcp dport @s drop; add counter inet preroute c; add rule inet preroute other jump output")
	if r := p.check(policyNGINX); r.cniErr == nil {
		t.Error("CHECK finds nothing wrong with another's table of our name")
	}
	p.mustAdd(policyNGINX)
	same(t, "ADD over another's table of our name", shape(p.exact()), freshly(t, policyNGINX))
}

// TestADDsAtOnce runs the same ADD many times at once, as when a runtime gives
// up waiting and tries again.
func TestADDsAtOnce(t *testing.T) {
	for _, f := range flavours() {
		for _, pol := range lifePolicies[1:] {
			t.Run(f.name+" "+pol.name, func(t *testing.T) {
				p := bare(t)
				var done sync.WaitGroup
				for range 6 {
					l := p.launch("ADD", pol.text, using(f))
					done.Go(func() {
						if r, err := l.run(); err != nil || r.exit != 0 {
							t.Errorf("ADD: %v, %v", err, r.err())
						}
					})
				}
				done.Wait()
				same(t, "after six ADDs at once", shape(p.exact()), freshly(t, pol.text, using(f)))
				if err := p.check(pol.text, using(f)).err(); err != nil {
					t.Errorf("CHECK: %v", err)
				}
			})
		}
	}
}

// TestManyAnnotations hands over as many bytes of annotations as an object may
// have, 256 KiB, and a policy that fills them.
func TestManyAnnotations(t *testing.T) {
	p := bare(t)
	p.mustAdd(policyNGINX, withAnnotation("example.com/big", strings.Repeat("é", 120<<10)))
	same(t, "beside a big annotation", shape(p.exact()), freshly(t, policyNGINX))
	big := strings.Replace(policyNGINX, `"v":1,`, `"v":1,`+strings.Repeat(" ", 250<<10), 1)
	p.mustAdd(big)
	same(t, "by a big annotation", shape(p.exact()), freshly(t, policyNGINX))
	r := p.add(`{"v":1,"outbound":{"exceptPorts":"` + strings.Repeat("x", 250<<10) + `"}}`)
	if r.cniErr == nil || r.cniErr.Code != 7 || len(r.cniErr.Msg) > 1000 {
		t.Errorf("a big bad policy: want CNI error 7 of at most 1000 bytes, got %.1500v", r.err())
	}
}
