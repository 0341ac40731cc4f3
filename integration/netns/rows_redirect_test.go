package netns_test

import "testing"

// runScenarios runs each scenario with each flavour, in pods of their own.
func runScenarios(t *testing.T, scenarios []scenario) {
	for _, f := range flavours() {
		t.Run(f.name, func(t *testing.T) {
			for _, s := range scenarios {
				t.Run(s.name, func(t *testing.T) {
					t.Parallel()
					s.run(t, f)
				})
			}
		})
	}
}

// meshPolicy is the plain sidecar; its lines are tried under every change of
// surroundings that should not matter.
const (
	meshPolicy = `{"v":1, "proxy":{"uids":[2102]},
		"inbound":{"port":8901,"exceptPorts":"8887,8895-8896"},
		"outbound":{"port":8900,"exceptPorts":"9050-9059"}}`

	meshLines = `
		O1  app           tcp  far:80       >proxy-out
		O1  app           tcp  far:443      >proxy-out
		O1  app           tcp  far2:80      >proxy-out
		O1  app           tcp  gw:80        >proxy-out
		O1  app           tcp  far:7777     >proxy-out
		O1  app           tcp  far:8900     >proxy-out
		O1  app           tcp  far:8901     >proxy-out
		O1  app           tcp  far:53       >proxy-out
		O1  app@alias     tcp  far:80       >proxy-out
		O1  root          tcp  far:80       >proxy-out
		O1  gid           tcp  far:80       >proxy-out
		O2  proxy         tcp  far:80       world
		O2  proxy         tcp  far:8900     world
		O2  proxy         tcp  far:8901     world
		O2  proxy         udp  far:53       world
		O2  2102:1000     tcp  far:80       world
		O3  app           tcp  loop:80      app
		O3  root          tcp  loop:80      app
		O3  proxy         tcp  loop:80      app
		O3  app           tcp  loop:8900    proxy-out
		O3  app           tcp  loop:8901    proxy-in
		O3  app           tcp  loop2:80     app        4
		O3  proxy         tcp  loop2:8080   app        4
		O3  app           tcp  loop:7777    nobody
		O4  app           tcp  pod:80       app
		O4  app           tcp  alias:80     app
		O4  app@loop      tcp  pod:80       app
		O4  root          tcp  pod:80       app
		O4  app           tcp  pod:7777     nobody
		O5  proxy         tcp  pod:80       app
		O5  proxy         tcp  alias:80     app
		O5  proxy@loop    tcp  pod:80       app
		O5  proxy         tcp  pod:8887     app
		O6  app           tcp  far:9049     >proxy-out
		O6  app           tcp  far:9050     world
		O6  app           tcp  far:9059     world
		O6  app           tcp  far:9060     >proxy-out
		Z1  app           udp  far:53       world
		Z1  app           udp  far:5353     world
		Z1  outside       udp  pod:53       app
		I1  outside       tcp  pod:80       >proxy-in
		I1  outside       tcp  pod:443      >proxy-in
		I1  outside       tcp  pod:53       >proxy-in
		I1  outside       tcp  alias:80     >proxy-in
		I1  outside@far   tcp  pod:80       >proxy-in
		I1  outside       tcp  pod:7777     >proxy-in
		I1  outside       tcp  pod:22       >proxy-in
		I1  outside       tcp  pod:8900     >proxy-in
		I2  outside       tcp  pod:8887     app
		I2  outside       tcp  alias:8887   app
		I2  outside       tcp  pod:8894     >proxy-in
		I2  outside       tcp  pod:8895     app
		I2  outside       tcp  pod:8896     app
		I2  outside       tcp  pod:8897     >proxy-in
		I3  outside       tcp  pod:8901     proxy-in
		I3  outside       tcp  alias:8901   proxy-in`
)

func TestMesh(t *testing.T) {
	runScenarios(t, []scenario{
		{name: "plain", policy: meshPolicy, lines: meshLines},
		{name: "twice", policy: meshPolicy, lines: meshLines, twice: true},
		{name: "two interfaces", policy: meshPolicy, opts: []podOption{withSecond}, lines: meshLines + `
			O1  app           tcp  via2:80      >proxy-out
			O1  app@second    tcp  via2:80      >proxy-out
			O1  app@second    tcp  far:80       >proxy-out
			O2  proxy         tcp  via2:80      world
			O4  app           tcp  second:80    app
			O5  proxy         tcp  second:80    app
			I1  outside       tcp  second:80    >proxy-in
			I1  outside@via2  tcp  second:7777  >proxy-in
			I2  outside       tcp  second:8887  app`},
		{name: "interface net0", policy: meshPolicy, opts: []podOption{named("net0")}, lines: meshLines},
		{name: "without IPv6", policy: meshPolicy, opts: []podOption{withoutIPv6}, families: "4", lines: meshLines},
		{name: "IPv6 comes later", policy: meshPolicy, opts: []podOption{withoutIPv6}, after: (*pod).enableIPv6WithAlias, lines: meshLines},
		{name: "addresses come later", policy: meshPolicy, opts: []podOption{withSecond}, lines: `
				O4  app      tcp  second:80  app
				I1  outside  tcp  second:80  >proxy-in
				O1  app      tcp  via2:80    >proxy-out`,
			before: func(p *pod) {
				p.exec("ip", "-4", "address", "flush", "dev", "eth1")
				p.exec("ip", "-6", "address", "flush", "dev", "eth1", "scope", "global")
			},
			after: func(p *pod) {
				p.addAddress("eth1", secondIPv4)
				p.addAddress("eth1", secondIPv6)
				p.exec("ip", "route", "replace", "203.0.113.0/24", "via", secondGwIPv4.Addr().String())
				p.exec("ip", "-6", "route", "replace", "2001:db8:2::/48", "via", secondGwIPv6.Addr().String())
			}},
		{name: "after another policy", policy: meshPolicy, lines: meshLines, before: func(p *pod) {
			p.mustAdd(`{"v":1, "proxy":{"uids":[0,1000],"hairpin":true}, "inbound":{"port":9,"mode":"tproxy","ports":"1-9"},
				"outbound":{"port":9,"exceptNets":["0.0.0.0/0","::/0"]}, "dns":{"port":9}, "exceptInterfaces":["eth0"]}`)
		}},
	})
}

// Fields of the policy one by one, with the overlaps that are easy to get wrong.
func TestOutboundExceptions(t *testing.T) {
	runScenarios(t, []scenario{
		{name: "the proxy by GID", policy: `{"v":1,"proxy":{"gids":[2102]},"outbound":{"port":8900}}`, lines: `
			O2  gid        tcp  far:80  world
			O2  proxy      tcp  far:80  world
			O1  2102:1000  tcp  far:80  >proxy-out
			O1  app        tcp  far:80  >proxy-out
			O1  root       tcp  far:80  >proxy-out`},
		{name: "the proxy by UID or GID", policy: `{"v":1,"proxy":{"uids":[3000,3001],"gids":[2102,2103]},"outbound":{"port":8900}}`, lines: `
			O2  3000:1000  tcp  far:80  world
			O2  3001:1000  tcp  far:80  world
			O2  1000:2103  tcp  far:80  world
			O2  gid        tcp  far:80  world
			O1  2102:1000  tcp  far:80  >proxy-out
			O1  3002:1000  tcp  far:80  >proxy-out
			O1  2999:2101  tcp  far:80  >proxy-out`},
		{name: "the proxy is root", policy: `{"v":1,"proxy":{"uids":[0]},"outbound":{"port":8900}}`, lines: `
			O2  root  tcp  far:80  world
			O1  app   tcp  far:80  >proxy-out`},
		{name: "the proxy has the last UID", policy: `{"v":1,"proxy":{"uids":[4294967294]},"outbound":{"port":8900}}`, lines: `
			O2  4294967294:1000  tcp  far:80  world
			O1  4294967293:1000  tcp  far:80  >proxy-out
			O1  root             tcp  far:80  >proxy-out`},
		{name: "no proxy named", policy: `{"v":1,"outbound":{"port":8900}}`, lines: `
			O1  app    tcp  far:80  >proxy-out
			O1  proxy  tcp  far:80  >proxy-out
			O4  app    tcp  pod:80  app`},
		{name: "all nets", policy: `{"v":1,"proxy":{"uids":[2102]},"outbound":{"port":8900,"nets":["0.0.0.0/0","::/0"]}}`, lines: `
			O1  app    tcp  far:80   >proxy-out
			O2  proxy  tcp  far:80   world
			O3  app    tcp  loop:80  app
			O4  app    tcp  pod:80   app`},
		{name: "nets of IPv4 only", policy: `{"v":1,"proxy":{"uids":[2102]},"outbound":{"port":8900,"nets":["198.51.100.0/25","10.0.0.0/8"]}}`, lines: `
			O1  app  tcp  far:80   >proxy-out  4
			O1  app  tcp  gw:80    >proxy-out  4
			O6  app  tcp  far2:80  world       4
			O6  app  tcp  far:80   world       6
			O6  app  tcp  gw:80    world       6`},
		{name: "nets of IPv6 only", policy: `{"v":1,"proxy":{"uids":[2102]},"outbound":{"port":8900,"nets":["2001:db8:1::/64"]}}`, lines: `
			O6  app  tcp  far:80   world       4
			O6  app  tcp  gw:80    world       4
			O1  app  tcp  far:80   >proxy-out  6
			O6  app  tcp  far2:80  world       6`},
		{name: "excepted nets", policy: `{"v":1,"proxy":{"uids":[2102]},"outbound":{"port":8900,"exceptNets":["198.51.100.128/25","2001:db8:1:2::/64","10.77.0.1/32"]}}`, lines: `
			O1  app   tcp  far:80   >proxy-out
			O6  app   tcp  far2:80  world
			O6  root  tcp  far2:80  world
			O6  app   tcp  gw:80    world       4
			O1  app   tcp  gw:80    >proxy-out  6`},
		{name: "all of IPv4 excepted", policy: `{"v":1,"proxy":{"uids":[2102]},"outbound":{"port":8900,"exceptNets":["0.0.0.0/0"]}}`, lines: `
			O6  app  tcp  far:80  world       4
			O1  app  tcp  far:80  >proxy-out  6`},
		{name: "all of IPv6 excepted", policy: `{"v":1,"proxy":{"uids":[2102]},"outbound":{"port":8900,"exceptNets":["::/0"]}}`, lines: `
			O1  app  tcp  far:80  >proxy-out  4
			O6  app  tcp  far:80  world       6`},
		{name: "an excepted net within an included one", policy: `{"v":1,"proxy":{"uids":[2102]},"outbound":{"port":8900,
				"nets":["198.51.100.0/24","2001:db8:1::/48"],"exceptNets":["198.51.100.128/25","198.51.100.192/26","2001:db8:1:2::/64"]}}`, lines: `
			O1  app  tcp  far:80   >proxy-out
			O6  app  tcp  far2:80  world
			O6  app  tcp  gw:80    world`},
		{name: "an included net within an excepted one", policy: `{"v":1,"proxy":{"uids":[2102]},"outbound":{"port":8900,
				"nets":["198.51.100.9/32","2001:db8:1::9/128"],"exceptNets":["198.51.100.0/24","2001:db8::/32"]}}`, lines: `
			O6  app  tcp  far:80   world
			O6  app  tcp  far2:80  world`},
		{name: "ports", policy: `{"v":1,"proxy":{"uids":[2102]},"outbound":{"port":8900,"ports":"80, 443 ,9000-9100","exceptPorts":"9050,443"}}`, lines: `
			O1  app  tcp  far:80    >proxy-out
			O6  app  tcp  far:443   world
			O6  app  tcp  far:8080  world
			O1  app  tcp  far:9000  >proxy-out
			O1  app  tcp  far:9049  >proxy-out
			O6  app  tcp  far:9050  world
			O1  app  tcp  far:9059  >proxy-out
			O1  app  tcp  far:9100  >proxy-out
			O6  app  tcp  far:9101  world`},
		{name: "ports and nets", policy: `{"v":1,"proxy":{"uids":[2102]},"outbound":{"port":8900,"ports":"80","nets":["198.51.100.0/25","2001:db8:1::/64"]}}`, lines: `
			O1  app  tcp  far:80    >proxy-out
			O6  app  tcp  far:443   world
			O6  app  tcp  far2:80   world
			O6  app  tcp  far2:443  world`},
		{name: "all ports excepted", policy: `{"v":1,"proxy":{"uids":[2102]},"outbound":{"port":8900,"exceptPorts":"1-65535"}}`, lines: `
			O6  app  tcp  far:80    world
			O6  app  tcp  far:9101  world`},
		{name: "UIDs", policy: `{"v":1,"proxy":{"uids":[2102]},"outbound":{"port":8900,"exceptUIDs":[0,1001,4294967294]}}`, lines: `
			O6  root             tcp  far:80  world
			O6  1001:1001        tcp  far:80  world
			O6  4294967294:1000  tcp  far:80  world
			O1  app              tcp  far:80  >proxy-out
			O1  1000:1001        tcp  far:80  >proxy-out
			O1  1002:1002        tcp  far:80  >proxy-out`},
		{name: "inbound is left alone", policy: `{"v":1,"proxy":{"uids":[2102],"hairpin":true},"outbound":{"port":8900}}`, lines: `
			O1  app      tcp  far:80    >proxy-out
			O5  proxy    tcp  pod:80    app
			I1  outside  tcp  pod:80    app
			I1  outside  tcp  pod:7777  nobody
			I1  outside  tcp  pod:8900  proxy-out`},
	})
}

func TestInboundExceptions(t *testing.T) {
	for _, mode := range []string{"redirect", "tproxy"} {
		t.Run(mode, func(t *testing.T) {
			inbound := func(fields string) string {
				return `{"v":1,"proxy":{"uids":[2102]},"inbound":{"port":8901,"mode":"` + mode + `"` + fields + `}}`
			}
			runScenarios(t, []scenario{
				{name: "ports", policy: inbound(`,"ports":"80,8000-8100","exceptPorts":"8080"`), lines: `
					I1  outside  tcp  pod:80    >proxy-in
					I2  outside  tcp  pod:443   app
					I1  outside  tcp  pod:8000  >proxy-in
					I2  outside  tcp  pod:8080  app
					I1  outside  tcp  pod:8100  >proxy-in
					I2  outside  tcp  pod:8101  app
					I3  outside  tcp  pod:8901  proxy-in`},
				{name: "sources", policy: inbound(`,"exceptSources":["198.51.100.128/25","2001:db8:1:2::/64"]`), lines: `
					I1  outside       tcp  pod:80    >proxy-in
					I1  outside@far   tcp  pod:80    >proxy-in
					I2  outside@far2  tcp  pod:80    app
					I2  outside@far2  tcp  pod:7777  nobody
					I2  outside@far2  tcp  pod:8901  proxy-in`},
				{name: "all IPv4 sources", policy: inbound(`,"exceptSources":["0.0.0.0/0"]`), lines: `
					I2  outside  tcp  pod:80  app        4
					I1  outside  tcp  pod:80  >proxy-in  6`},
				{name: "all IPv6 sources", policy: inbound(`,"exceptSources":["::/0"]`), lines: `
					I1  outside  tcp  pod:80  >proxy-in  4
					I2  outside  tcp  pod:80  app        6`},
				{name: "sources and ports", policy: inbound(`,"exceptSources":["198.51.100.128/25","2001:db8:1:2::/64"],"ports":"80,443","exceptPorts":"443"`), lines: `
					I1  outside       tcp  pod:80    >proxy-in
					I2  outside       tcp  pod:443   app
					I2  outside       tcp  pod:8080  app
					I2  outside@far2  tcp  pod:80    app`},
				{name: "outbound is left alone", policy: inbound(``), lines: `
					I1  outside  tcp  pod:80    >proxy-in
					I1  outside  tcp  pod:7777  >proxy-in
					O1  app      tcp  far:80    world
					O2  proxy    tcp  far:80    world
					O4  app      tcp  pod:80    app
					O5  proxy    tcp  pod:80    app`},
			})
		})
	}
}

func TestExceptInterfaces(t *testing.T) {
	runScenarios(t, []scenario{
		{name: "the second", opts: []podOption{withSecond}, policy: `{"v":1,"proxy":{"uids":[2102]},"inbound":{"port":8901},"outbound":{"port":8900},"dns":{"port":15053},"exceptInterfaces":["eth1","eth7"]}`, lines: `
			I5  app           tcp  via2:80    world
			I5  app           udp  via2:53    world
			I5  outside       tcp  second:80  app
			I5  outside@via2  tcp  second:80  app
			O1  app           tcp  far:80     >proxy-out
			D1  app           udp  far:53     >dns-proxy
			I1  outside       tcp  pod:80     >proxy-in`},
		{name: "the second, tproxy", opts: []podOption{withSecond}, policy: `{"v":1,"proxy":{"uids":[2102]},"inbound":{"port":8901,"mode":"tproxy"},"outbound":{"port":8900},"exceptInterfaces":["eth1"]}`, lines: `
			I5  app           tcp  via2:80    world
			I5  outside       tcp  second:80  app
			O1  app           tcp  far:80     >proxy-out
			I1  outside       tcp  pod:80     >proxy-in`},
		{name: "the first", opts: []podOption{named("net0"), withSecond}, policy: `{"v":1,"proxy":{"uids":[2102]},"inbound":{"port":8901},"outbound":{"port":8900},"exceptInterfaces":["net0"]}`, lines: `
			I5  app      tcp  far:80     world
			I5  outside  tcp  pod:80     app
			O1  app      tcp  via2:80    >proxy-out
			I1  outside  tcp  second:80  >proxy-in`},
	})
}

const hairpinLines = `
	O5  proxy              tcp  pod:80      >proxy-in
	O5  proxy              tcp  pod:7777    >proxy-in
	O5  proxy              tcp  alias:80    >proxy-in
	O5  proxy@loop         tcp  pod:80      >proxy-in
	O5  proxy@alias        tcp  pod:80      >proxy-in
	O5  proxy@passthrough  tcp  pod:80      app
	O5  proxy@passthrough  tcp  alias:8080  app
	O5  proxy              tcp  pod:8887    app
	O5  proxy              tcp  pod:8901    proxy-in
	O3  proxy              tcp  loop:80     app
	O3  proxy              tcp  loop2:80    app       4
	O2  proxy              tcp  far:80      world
	O4  app                tcp  pod:80      app
	O4  root               tcp  pod:8080    app
	O3  app                tcp  loop:80     app
	I1  outside            tcp  pod:80      >proxy-in
	I2  outside            tcp  pod:8887    app
	I3  outside            tcp  pod:8901    proxy-in`

func TestHairpin(t *testing.T) {
	runScenarios(t, []scenario{
		{name: "redirect", policy: `{"v":1,"proxy":{"uids":[2102],"hairpin":true},"inbound":{"port":8901,"exceptPorts":"8887"},"outbound":{"port":8900,"exceptPorts":"80"}}`, lines: hairpinLines},
		{name: "tproxy", policy: `{"v":1,"proxy":{"uids":[2102],"hairpin":true},"inbound":{"port":8901,"mode":"tproxy","exceptPorts":"8887"},"outbound":{"port":8900,"exceptPorts":"80"}}`, lines: hairpinLines},
		{name: "tproxy twice", twice: true, policy: `{"v":1,"proxy":{"uids":[2102],"hairpin":true},"inbound":{"port":8901,"mode":"tproxy","exceptPorts":"8887"},"outbound":{"port":8900,"exceptPorts":"80"}}`, lines: hairpinLines},
		{name: "without outbound", policy: `{"v":1,"proxy":{"uids":[2102],"hairpin":true},"inbound":{"port":8901,"exceptPorts":"8887"}}`, lines: hairpinLines},
		{name: "by GID", policy: `{"v":1,"proxy":{"gids":[2102],"hairpin":true},"inbound":{"port":8901}}`, lines: `
			O5  gid                tcp  pod:80  >proxy-in
			O5  proxy              tcp  pod:80  >proxy-in
			O5  proxy@passthrough  tcp  pod:80  app
			O4  app                tcp  pod:80  app`},
		{name: "included ports", policy: `{"v":1,"proxy":{"uids":[2102],"hairpin":true},"inbound":{"port":8901,"ports":"80"}}`, lines: `
			O5  proxy  tcp  pod:80   >proxy-in
			O5  proxy  tcp  pod:443  app`},
		{name: "excepted source", policy: `{"v":1,"proxy":{"uids":[2102],"hairpin":true},"inbound":{"port":8901,"exceptSources":["10.77.0.200/32","fd00:77::200/128"]}}`, lines: `
			O5  proxy        tcp  pod:80  >proxy-in
			O5  proxy@alias  tcp  pod:80  app`},
		{name: "without IPv6", opts: []podOption{withoutIPv6}, families: "4", policy: `{"v":1,"proxy":{"uids":[2102],"hairpin":true},"inbound":{"port":8901,"exceptPorts":"8887"},"outbound":{"port":8900}}`, lines: hairpinLines},
	})
}

func TestTProxy(t *testing.T) {
	const policy = `{"v":1, "proxy":{"uids":[2102]},
		"inbound":{"port":8901,"mode":"tproxy","exceptPorts":"8887,8895-8896"},
		"outbound":{"port":8900,"exceptPorts":"9050-9059"}}`
	runScenarios(t, []scenario{
		{name: "plain", policy: policy, lines: meshLines},
		{name: "twice", policy: policy, lines: meshLines, twice: true},
		{name: "two interfaces", policy: policy, opts: []podOption{withSecond}, lines: meshLines + `
			O1  app           tcp  via2:80      >proxy-out
			O4  app           tcp  second:80    app
			O5  proxy         tcp  second:80    app
			I1  outside       tcp  second:80    >proxy-in
			I2  outside       tcp  second:8887  app`},
		{name: "without IPv6", policy: policy, opts: []podOption{withoutIPv6}, families: "4", lines: meshLines},
		{name: "IPv6 comes later", policy: policy, opts: []podOption{withoutIPv6}, after: (*pod).enableIPv6WithAlias, lines: meshLines},
	})
}

// F1: what would have gone to the proxy goes nowhere, the rest as ever. The
// lines that end at the proxy without a redirect are not in it.
func TestProxyIsDown(t *testing.T) {
	const lines = `
		O1  app      tcp  far:80     >proxy-out
		O1  root     tcp  far:443    >proxy-out
		O1  app      tcp  far:9101   >proxy-out
		O2  proxy    tcp  far:80     world
		O3  app      tcp  loop:80    app
		O4  app      tcp  pod:80     app
		O6  app      tcp  far:9050   world
		I1  outside  tcp  pod:80     >proxy-in
		I1  outside  tcp  alias:80   >proxy-in
		I1  outside  tcp  pod:7777   >proxy-in
		I1  outside  tcp  pod:8900   >proxy-in
		I3  outside  tcp  pod:8901   nobody
		I2  outside  tcp  pod:8887   app`
	runScenarios(t, []scenario{
		{name: "redirect", down: true, lines: lines, policy: `{"v":1,"proxy":{"uids":[2102]},"inbound":{"port":8901,"exceptPorts":"8887"},"outbound":{"port":8900,"exceptPorts":"9050"}}`},
		{name: "tproxy", down: true, lines: lines, policy: `{"v":1,"proxy":{"uids":[2102]},"inbound":{"port":8901,"mode":"tproxy","exceptPorts":"8887"},"outbound":{"port":8900,"exceptPorts":"9050"}}`},
		{name: "hairpin", down: true, policy: `{"v":1,"proxy":{"uids":[2102],"hairpin":true},"inbound":{"port":8901}}`, lines: `
			O5  proxy              tcp  pod:80  >proxy-in
			O5  proxy@passthrough  tcp  pod:80  app`},
		{name: "hairpin, tproxy", down: true, policy: `{"v":1,"proxy":{"uids":[2102],"hairpin":true},"inbound":{"port":8901,"mode":"tproxy"}}`, lines: `
			O5  proxy              tcp  pod:80   >proxy-in
			O5  proxy@passthrough  tcp  pod:80   app
			I1  outside            tcp  pod:80   >proxy-in`},
		{name: "DNS", down: true, policy: `{"v":1,"proxy":{"uids":[2102]},"outbound":{"port":8900},"dns":{"port":15053}}`, lines: `
			D1  app    udp  far:53   >dns-proxy
			D1  app    tcp  far:53   >dns-proxy
			D1  root   udp  gw:53    >dns-proxy
			D2  proxy  udp  far:53   world
			D2  proxy  tcp  far:53   world
			O3  app    udp  loop:53  app
			O4  app    udp  pod:53   app`},
		{name: "without IPv6, then with", down: true, opts: []podOption{withoutIPv6}, after: (*pod).enableIPv6WithAlias, policy: `{"v":1,"proxy":{"uids":[2102]},"inbound":{"port":8901},"outbound":{"port":8900},"dns":{"port":15053}}`, lines: `
			O1  app      tcp  far:80  >proxy-out
			D1  app      udp  far:53  >dns-proxy
			I1  outside  tcp  pod:80  >proxy-in`},
	})
}

// Z1: without a policy, or when another path serves the pod, nothing is
// redirected and nothing at all is in the namespace.
func TestNothingToDo(t *testing.T) {
	for _, f := range flavours() {
		for _, c := range []struct{ name, policy, path string }{
			{"no policy", "", ""},
			{"a policy of no direction", `{"v":1}`, ""},
			{"an empty policy", `{}`, ""},
			{"path init", meshPolicy, "init"},
			{"path none", meshPolicy, "none"},
		} {
			t.Run(f.name+"/"+c.name, func(t *testing.T) {
				t.Parallel()
				p := newPod(t)
				before := p.dump()
				opts := []option{using(f)}
				if c.path != "" {
					opts = append(opts, withAnnotation("preroute.io/path", c.path))
				}
				p.mustAdd(c.policy, opts...)
				if after := p.dump(); after != before {
					t.Errorf("the namespace has changed\nbefore:\n%s\nafter:\n%s", before, after)
				}
				p.outside().serve(request{Op: "listen", Who: "world", Net: "tcp"}, ":80")
				p.agent(appOwner).serve(request{Op: "listen", Who: "app", Net: "tcp"}, ":80")
				for _, family := range []string{"4", "6"} {
					a := addresses(family)
					to := func(name string) request {
						return request{Op: "dial", Net: "tcp" + family, Remotes: []string{hostPort(a[name].String(), "80")}, Say: "describe"}
					}
					if got := p.agent(appOwner).do(to("far")).Outcomes[0]; got.View.Who != "world" || got.View.Orig != "" {
						t.Errorf("out: %+v", got)
					}
					if got := p.outside().do(to("pod")).Outcomes[0]; got.View.Who != "app" || got.View.Orig != "" {
						t.Errorf("in: %+v", got)
					}
				}
			})
		}
	}
}
