package netns_test

import "testing"

func TestDNS(t *testing.T) {
	const lines = `
		D1  app      udp  far:53    >dns-proxy
		D1  app      udp  far2:53   >dns-proxy
		D1  app      udp  gw:53     >dns-proxy
		D1  root     udp  far:53    >dns-proxy
		D1  app      tcp  far:53    >dns-proxy
		D1  root     tcp  gw:53     >dns-proxy
		D2  proxy    udp  far:53    world
		D2  proxy    udp  gw:53     world
		D2  proxy    tcp  far:53    world
		O3  app      udp  loop:53   app
		O3  proxy    udp  loop:53   app
		O3  app      tcp  loop:53   app
		O3  app      udp  loop2:53  app        4
		O3  app      udp  loop:15053  dns-proxy
		O4  app      udp  pod:53    app
		O4  app      udp  alias:53  app
		O4  app      tcp  pod:53    app
		O5  proxy    udp  pod:53    app
		Z1  app      udp  far:5353  world
		Z1  outside  udp  pod:53    app`
	const mesh = `
		O1  app      tcp  far:80    >proxy-out
		O6  app      tcp  far:9050  world
		I1  outside  tcp  pod:80    >proxy-in
		I1  outside  tcp  pod:53    >proxy-in`
	const policy = `{"v":1,"proxy":{"uids":[2102]},"inbound":{"port":8901},"outbound":{"port":8900,"exceptPorts":"53,9050"},"dns":{"port":15053}}`
	runScenarios(t, []scenario{
		{name: "with a mesh", policy: policy, lines: lines + mesh},
		{name: "twice", policy: policy, lines: lines + mesh, twice: true},
		{name: "alone", policy: `{"v":1,"proxy":{"uids":[2102]},"dns":{"port":15053}}`, lines: lines + `
			O1  app      tcp  far:80    world
			I1  outside  tcp  pod:53    app`},
		{name: "with tproxy and hairpin", policy: `{"v":1,"proxy":{"uids":[2102],"hairpin":true},"inbound":{"port":8901,"mode":"tproxy"},"outbound":{"port":8900,"exceptPorts":"9050"},"dns":{"port":15053}}`, lines: lines + mesh},
		{name: "the proxy listens on loopback only", policy: policy, dnsAddrs: []string{"127.0.0.1:15053", "[::1]:15053"}, lines: lines},
		{name: "whatever ports and nets say", policy: `{"v":1,"proxy":{"uids":[2102]},"outbound":{"port":8900,"ports":"80","nets":["192.0.2.0/24"]},"dns":{"port":15053}}`, lines: `
			D1  app  udp  far:53  >dns-proxy
			D1  app  tcp  far:53  >dns-proxy
			O6  app  tcp  far:80  world`},
		{name: "excepted nets", policy: `{"v":1,"proxy":{"uids":[2102]},"outbound":{"port":8900,"exceptNets":["198.51.100.128/25","2001:db8:1:2::/64"]},"dns":{"port":15053}}`, lines: `
			D1  app  udp  far:53   >dns-proxy
			D1  app  tcp  far:53   >dns-proxy
			D1  app  udp  far2:53  world
			D1  app  tcp  far2:53  world`},
		{name: "excepted nets without outbound", policy: `{"v":1,"proxy":{"uids":[2102]},"outbound":{"port":0,"exceptNets":["198.51.100.128/25","2001:db8:1:2::/64"]},"dns":{"port":15053}}`, lines: `
			D1  app  udp  far:53   >dns-proxy
			D1  app  udp  far2:53  world`},
		{name: "excepted UIDs", policy: `{"v":1,"proxy":{"uids":[2102]},"outbound":{"port":8900,"exceptUIDs":[0,1001]},"dns":{"port":15053}}`, lines: `
			D1  app        udp  far:53  >dns-proxy
			D1  app        tcp  far:53  >dns-proxy
			D1  root       udp  far:53  world
			D1  root       tcp  far:53  world
			D1  1001:1001  udp  far:53  world`},
		{name: "the proxy by GID", policy: `{"v":1,"proxy":{"gids":[2102]},"dns":{"port":15053}}`, lines: `
			D2  gid    udp  far:53  world
			D2  proxy  udp  far:53  world
			D1  app    udp  far:53  >dns-proxy`},
		{name: "without IPv6", opts: []podOption{withoutIPv6}, families: "4", policy: policy, lines: lines + mesh},
		{name: "IPv6 comes later", opts: []podOption{withoutIPv6}, after: (*pod).enableIPv6WithAlias, policy: policy, lines: lines + mesh},
	})
}
