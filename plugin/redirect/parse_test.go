package redirect_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/preroute/preroute/plugin/redirect"
)

// Each mistake and the whole text of its error, which is what kubectl describe
// pod shows behind the name of the annotation.
var mistakes = []struct{ policy, want string }{
	// the document
	{"",
		`not valid JSON: it ends too early`},
	{`   `,
		`   : not valid JSON: it ends too early`},
	{`{`,
		`{: not valid JSON: it ends too early`},
	{`{"v":1`,
		`{"v":1: not valid JSON: it ends too early`},
	{`{"v":1}}`,
		`{"v":1}}: not valid JSON: a second value follows: }`},
	{`{"v":1} {"v":1}`,
		`{"v":1} {"v":1}: not valid JSON: a second value follows: {"v":1}`},
	{`{"v":1},`,
		`{"v":1},: not valid JSON: a second value follows: ,`},
	{`{"v":1}x`,
		`{"v":1}x: not valid JSON: a second value follows: x`},
	{`null`,
		`null: want an object`},
	{`[]`,
		`[]: want an object`},
	{`[1]`,
		`[1]: want an object`},
	{`1`,
		`1: want an object`},
	{`"x"`,
		`"x": want an object`},
	{`true`,
		`true: want an object`},
	{`policy`,
		`policy: not valid JSON: invalid character 'p' looking for beginning of value`},
	{`{'v':1}`,
		`{'v':1}: not valid JSON: invalid character '\'' looking for beginning of object key string`},
	{`{"v":1,}`,
		`{"v":1,}: not valid JSON: invalid character '}' looking for beginning of object key string`},
	{`{v:1}`,
		`{v:1}: not valid JSON: invalid character 'v' looking for beginning of object key string`},
	{`{"v" 1}`,
		`{"v" 1}: not valid JSON: invalid character '1' after object key`},
	{`{"v":1 "dns":{}}`,
		`{"v":1 "dns":{}}: not valid JSON: invalid character '"' after object key:value pair`},
	{`{"v":1,"dns":{"port":1,}}`,
		`{"v":1,"dns":{"port":1,}}: not valid JSON: invalid character '}' looking for beginning of object key string`},
	{"{\"v\":1}\x00",
		`{"v":1} : not valid JSON: a second value follows:  `},
	{"\ufeff{\"v\":1}",
		` {"v":1}: not valid JSON: invalid character 'ï' looking for beginning of value`},
	{`{"v":01}`,
		`{"v":01}: not valid JSON: invalid character '1' after object key:value pair`},
	{`{"v":+1}`,
		`{"v":+1}: not valid JSON: invalid character '+' looking for beginning of value`},
	{`{"v":0x1}`,
		`{"v":0x1}: not valid JSON: invalid character 'x' after object key:value pair`},
	{`{"v":NaN}`,
		`{"v":NaN}: not valid JSON: invalid character 'N' looking for beginning of value`},
	{`{"v":1,"proxy":{"uids":[1,]}}`,
		`{"v":1,"proxy":{"uids":[1,]}}: not valid JSON: invalid character ']' looking for beginning of value`},
	{`{"v":1}//`,
		`{"v":1}//: not valid JSON: a second value follows: //`},
	{`{"v":[[[[[[[[[[1]]]]]]]]]]}`,
		`{"v":[[[[[[[[[[1]]]]]]]]]]}: not valid JSON: nested too deeply`},
	// the version
	{`{"proxy":{}}`,
		`v: missing: want "v": 1`},
	{`{"v":0}`,
		`v: 0: this build knows policy version 1 only`},
	{`{"v":2}`,
		`v: 2: this build knows policy version 1 only`},
	{`{"v":-1}`,
		`v: -1: this build knows policy version 1 only`},
	{`{"v":"1"}`,
		`v: "1": want a whole number`},
	{`{"v":null}`,
		`v: null: want a whole number`},
	{`{"v":1.0}`,
		`v: 1.0: want a whole number`},
	{`{"v":1e0}`,
		`v: 1e0: want a whole number`},
	{`{"v":true}`,
		`v: true: want a whole number`},
	{`{"v":99999999999999999999}`,
		`v: 99999999999999999999: want a whole number`},
	// names
	{`{"v":1,"v":1}`,
		`v: 1: given twice; write it once`},
	{`{"v":1,"outbound":{"port":1},"outbound":{"port":1}}`,
		`outbound: {"port":1}: given twice; write it once`},
	{`{"v":1,"dns":{"port":1,"port":2}}`,
		`dns.port: 2: given twice; write it once`},
	{`{"v":1,"Proxy":{}}`,
		`Proxy: {}: unknown field; this level knows v, proxy, inbound, outbound, udp, dns, exceptInterfaces`},
	{`{"V":1}`,
		`V: 1: unknown field; this level knows v, proxy, inbound, outbound, udp, dns, exceptInterfaces`},
	{`{"v":1,"proxy":{"UIDs":[1]}}`,
		`proxy.UIDs: [1]: unknown field; this level knows uids, gids, hairpin`},
	{`{"v":1,"outbound":{"exceptUids":[1]}}`,
		`outbound.exceptUids: [1]: unknown field; this level knows port, ports, exceptPorts, nets, exceptNets, exceptUIDs`},
	{`{"v":1,"in":{}}`,
		`in: {}: unknown field; this level knows v, proxy, inbound, outbound, udp, dns, exceptInterfaces`},
	{`{"v":1,"":1}`,
		`"": 1: unknown field; this level knows v, proxy, inbound, outbound, udp, dns, exceptInterfaces`},
	{`{"v":1,"dns":{"":1}}`,
		`dns."": 1: unknown field; this level knows port`},
	{`{"v":1,"dns":{"port":1,"mode":"x"}}`,
		`dns.mode: "x": unknown field; this level knows port`},
	{`{"v":1,"inbound":{"exceptUIDs":[1]}}`,
		`inbound.exceptUIDs: [1]: unknown field; this level knows port, mode, ports, exceptPorts, exceptSources`},
	{`{"v":1,"outbound":{"mode":"redirect"}}`,
		`outbound.mode: "redirect": unknown field; this level knows port, ports, exceptPorts, nets, exceptNets, exceptUIDs`},
	{`{"v":1,"udp":{"port":1}}`,
		`udp.port: 1: unknown field; this level knows mode, inboundPort, outboundPort`},
	{`{"v":1,"po rt":1}`,
		`po rt: 1: unknown field; this level knows v, proxy, inbound, outbound, udp, dns, exceptInterfaces`},
	{`{"v":1,"a\nb":1}`,
		`a b: 1: unknown field; this level knows v, proxy, inbound, outbound, udp, dns, exceptInterfaces`},
	{`{"v":1,"xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx":{"x":[1,2,3]}}`,
		`xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx…: {"x":[1,2,3]}: unknown field; this level knows v, proxy, inbound, outbound, udp, dns, exceptInterfaces`},
	// objects
	{`{"v":1,"proxy":[]}`,
		`proxy: []: want an object`},
	{`{"v":1,"inbound":8901}`,
		`inbound: 8901: want an object`},
	{`{"v":1,"outbound":"8900"}`,
		`outbound: "8900": want an object`},
	{`{"v":1,"udp":true}`,
		`udp: true: want an object`},
	{`{"v":1,"dns":15053}`,
		`dns: 15053: want an object`},
	// numbers
	{`{"v":1,"dns":{"port":-1}}`,
		`dns.port: -1: want a whole number from 0 to 65535`},
	{`{"v":1,"dns":{"port":65536}}`,
		`dns.port: 65536: want a whole number from 0 to 65535`},
	{`{"v":1,"dns":{"port":1e3}}`,
		`dns.port: 1e3: want a whole number from 0 to 65535`},
	{`{"v":1,"dns":{"port":1.0}}`,
		`dns.port: 1.0: want a whole number from 0 to 65535`},
	{`{"v":1,"dns":{"port":"53"}}`,
		`dns.port: "53": want a whole number from 0 to 65535`},
	{`{"v":1,"dns":{"port":null}}`,
		`dns.port: null: want a whole number from 0 to 65535`},
	{`{"v":1,"dns":{"port":true}}`,
		`dns.port: true: want a whole number from 0 to 65535`},
	{`{"v":1,"dns":{"port":[53]}}`,
		`dns.port: [53]: want a whole number from 0 to 65535`},
	{`{"v":1,"dns":{"port":{}}}`,
		`dns.port: {}: want a whole number from 0 to 65535`},
	{`{"v":1,"dns":{"port":99999999999999999999}}`,
		`dns.port: 99999999999999999999: want a whole number from 0 to 65535`},
	{`{"v":1,"dns":{"port":1E3}}`,
		`dns.port: 1E3: want a whole number from 0 to 65535`},
	{`{"v":1,"dns":{"port":0.5}}`,
		`dns.port: 0.5: want a whole number from 0 to 65535`},
	{`{"v":1,"dns":{"port":-0}}`,
		`dns.port: -0: want a whole number from 0 to 65535`},
	{`{"v":1,"inbound":{"port":65536}}`,
		`inbound.port: 65536: want a whole number from 0 to 65535`},
	{`{"v":1,"outbound":{"port":"8900"}}`,
		`outbound.port: "8900": want a whole number from 0 to 65535`},
	{`{"v":1,"udp":{"inboundPort":-1}}`,
		`udp.inboundPort: -1: want a whole number from 0 to 65535`},
	{`{"v":1,"udp":{"outboundPort":1.5}}`,
		`udp.outboundPort: 1.5: want a whole number from 0 to 65535`},
	// owners
	{`{"v":1,"proxy":{"uids":2102}}`,
		`proxy.uids: 2102: want a list`},
	{`{"v":1,"proxy":{"uids":"2102"}}`,
		`proxy.uids: "2102": want a list`},
	{`{"v":1,"proxy":{"uids":["2102"]}}`,
		`proxy.uids[0]: "2102": want a whole number from 0 to 4294967294`},
	{`{"v":1,"proxy":{"uids":[4294967295]}}`,
		`proxy.uids[0]: 4294967295: want a whole number from 0 to 4294967294`},
	{`{"v":1,"proxy":{"uids":[1,4294967296]}}`,
		`proxy.uids[1]: 4294967296: want a whole number from 0 to 4294967294`},
	{`{"v":1,"proxy":{"uids":[-1]}}`,
		`proxy.uids[0]: -1: want a whole number from 0 to 4294967294`},
	{`{"v":1,"proxy":{"uids":[1e3]}}`,
		`proxy.uids[0]: 1e3: want a whole number from 0 to 4294967294`},
	{`{"v":1,"proxy":{"uids":[1.0]}}`,
		`proxy.uids[0]: 1.0: want a whole number from 0 to 4294967294`},
	{`{"v":1,"proxy":{"uids":[null]}}`,
		`proxy.uids[0]: null: want a whole number from 0 to 4294967294`},
	{`{"v":1,"proxy":{"uids":[[1]]}}`,
		`proxy.uids[0]: [1]: want a whole number from 0 to 4294967294`},
	{`{"v":1,"proxy":{"uids":{}}}`,
		`proxy.uids: {}: want a list`},
	{`{"v":1,"proxy":{"gids":[4294967295]}}`,
		`proxy.gids[0]: 4294967295: want a whole number from 0 to 4294967294`},
	{`{"v":1,"proxy":{"gids":"root"}}`,
		`proxy.gids: "root": want a list`},
	{`{"v":1,"outbound":{"exceptUIDs":["root"]}}`,
		`outbound.exceptUIDs[0]: "root": want a whole number from 0 to 4294967294`},
	{`{"v":1,"outbound":{"exceptUIDs":[0,4294967295]}}`,
		`outbound.exceptUIDs[1]: 4294967295: want a whole number from 0 to 4294967294`},
	{`{"v":1,"proxy":{"hairpin":1}}`,
		`proxy.hairpin: 1: want true or false`},
	{`{"v":1,"proxy":{"hairpin":"true"}}`,
		`proxy.hairpin: "true": want true or false`},
	{`{"v":1,"proxy":{"hairpin":null}}`,
		`proxy.hairpin: null: want true or false`},
	// port sets
	{`{"v":1,"outbound":{"exceptPorts":"*"}}`,
		`outbound.exceptPorts: "*": item "*": want a port from 1 to 65535 or a range such as 9000-9100`},
	{`{"v":1,"outbound":{"exceptPorts":"0"}}`,
		`outbound.exceptPorts: "0": item "0": want a port from 1 to 65535 or a range such as 9000-9100`},
	{`{"v":1,"outbound":{"exceptPorts":"65536"}}`,
		`outbound.exceptPorts: "65536": item "65536": want a port from 1 to 65535 or a range such as 9000-9100`},
	{`{"v":1,"outbound":{"exceptPorts":"443,65536"}}`,
		`outbound.exceptPorts: "443,65536": item "65536": want a port from 1 to 65535 or a range such as 9000-9100`},
	{`{"v":1,"outbound":{"exceptPorts":"99999999"}}`,
		`outbound.exceptPorts: "99999999": item "99999999": want a port from 1 to 65535 or a range such as 9000-9100`},
	{`{"v":1,"outbound":{"exceptPorts":"80,,443"}}`,
		`outbound.exceptPorts: "80,,443": item "": want a port from 1 to 65535 or a range such as 9000-9100`},
	{`{"v":1,"outbound":{"exceptPorts":","}}`,
		`outbound.exceptPorts: ",": item "": want a port from 1 to 65535 or a range such as 9000-9100`},
	{`{"v":1,"outbound":{"exceptPorts":"80,"}}`,
		`outbound.exceptPorts: "80,": item "": want a port from 1 to 65535 or a range such as 9000-9100`},
	{`{"v":1,"outbound":{"exceptPorts":"80-"}}`,
		`outbound.exceptPorts: "80-": item "80-": want a port from 1 to 65535 or a range such as 9000-9100`},
	{`{"v":1,"outbound":{"exceptPorts":"-80"}}`,
		`outbound.exceptPorts: "-80": item "-80": want a port from 1 to 65535 or a range such as 9000-9100`},
	{`{"v":1,"outbound":{"exceptPorts":"-"}}`,
		`outbound.exceptPorts: "-": item "-": want a port from 1 to 65535 or a range such as 9000-9100`},
	{`{"v":1,"outbound":{"exceptPorts":"80-90-100"}}`,
		`outbound.exceptPorts: "80-90-100": item "80-90-100": want a port from 1 to 65535 or a range such as 9000-9100`},
	{`{"v":1,"outbound":{"exceptPorts":"90-80"}}`,
		`outbound.exceptPorts: "90-80": item "90-80": the range is reversed; write 80-90`},
	{`{"v":1,"outbound":{"exceptPorts":"0-80"}}`,
		`outbound.exceptPorts: "0-80": item "0-80": want a port from 1 to 65535 or a range such as 9000-9100`},
	{`{"v":1,"outbound":{"exceptPorts":"80-65536"}}`,
		`outbound.exceptPorts: "80-65536": item "80-65536": want a port from 1 to 65535 or a range such as 9000-9100`},
	{`{"v":1,"outbound":{"exceptPorts":"080"}}`,
		`outbound.exceptPorts: "080": item "080": want a port from 1 to 65535 or a range such as 9000-9100`},
	{`{"v":1,"outbound":{"exceptPorts":"8 0"}}`,
		`outbound.exceptPorts: "8 0": item "8 0": want a port from 1 to 65535 or a range such as 9000-9100`},
	{`{"v":1,"outbound":{"exceptPorts":"80 - 90"}}`,
		`outbound.exceptPorts: "80 - 90": item "80 - 90": want a port from 1 to 65535 or a range such as 9000-9100`},
	{`{"v":1,"outbound":{"exceptPorts":"80;443"}}`,
		`outbound.exceptPorts: "80;443": item "80;443": want a port from 1 to 65535 or a range such as 9000-9100`},
	{`{"v":1,"outbound":{"exceptPorts":"http"}}`,
		`outbound.exceptPorts: "http": item "http": want a port from 1 to 65535 or a range such as 9000-9100`},
	{`{"v":1,"outbound":{"exceptPorts":"all"}}`,
		`outbound.exceptPorts: "all": item "all": want a port from 1 to 65535 or a range such as 9000-9100`},
	{`{"v":1,"outbound":{"exceptPorts":"+80"}}`,
		`outbound.exceptPorts: "+80": item "+80": want a port from 1 to 65535 or a range such as 9000-9100`},
	{`{"v":1,"outbound":{"exceptPorts":"1e3"}}`,
		`outbound.exceptPorts: "1e3": item "1e3": want a port from 1 to 65535 or a range such as 9000-9100`},
	{`{"v":1,"outbound":{"exceptPorts":"80.0"}}`,
		`outbound.exceptPorts: "80.0": item "80.0": want a port from 1 to 65535 or a range such as 9000-9100`},
	{`{"v":1,"outbound":{"exceptPorts":"80\n443"}}`,
		`outbound.exceptPorts: "80\n443": item "80\n443": want a port from 1 to 65535 or a range such as 9000-9100`},
	{`{"v":1,"outbound":{"exceptPorts":"\u0660"}}`,
		`outbound.exceptPorts: "٠": item "٠": want a port from 1 to 65535 or a range such as 9000-9100`},
	{`{"v":1,"outbound":{"exceptPorts":"80,xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"}}`,
		`outbound.exceptPorts: "80,xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx…: item "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx…: want a port from 1 to 65535 or a range such as 9000-9100`},
	{`{"v":1,"outbound":{"ports":80}}`,
		`outbound.ports: 80: want a string of ports and ranges such as "80,443,9000-9100"`},
	{`{"v":1,"outbound":{"ports":["80"]}}`,
		`outbound.ports: ["80"]: want a string of ports and ranges such as "80,443,9000-9100"`},
	{`{"v":1,"outbound":{"ports":null}}`,
		`outbound.ports: null: want a string of ports and ranges such as "80,443,9000-9100"`},
	{`{"v":1,"inbound":{"ports":"*"}}`,
		`inbound.ports: "*": item "*": want a port from 1 to 65535 or a range such as 9000-9100`},
	{`{"v":1,"inbound":{"exceptPorts":true}}`,
		`inbound.exceptPorts: true: want a string of ports and ranges such as "80,443,9000-9100"`},
	// networks
	{`{"v":1,"outbound":{"exceptNets":[""]}}`,
		`outbound.exceptNets[0]: "": want a CIDR such as 10.0.0.0/8 or fd00::/8`},
	{`{"v":1,"outbound":{"exceptNets":["*"]}}`,
		`outbound.exceptNets[0]: "*": want a CIDR such as 10.0.0.0/8 or fd00::/8`},
	{`{"v":1,"outbound":{"exceptNets":["10.0.0.1"]}}`,
		`outbound.exceptNets[0]: "10.0.0.1": want a CIDR; write 10.0.0.1/32`},
	{`{"v":1,"outbound":{"exceptNets":["fd00::1"]}}`,
		`outbound.exceptNets[0]: "fd00::1": want a CIDR; write fd00::1/128`},
	{`{"v":1,"outbound":{"exceptNets":["fe80::1%eth0"]}}`,
		`outbound.exceptNets[0]: "fe80::1%eth0": want a CIDR such as 10.0.0.0/8 or fd00::/8`},
	{`{"v":1,"outbound":{"exceptNets":["fe80::1%eth0/64"]}}`,
		`outbound.exceptNets[0]: "fe80::1%eth0/64": want a CIDR such as 10.0.0.0/8 or fd00::/8`},
	{`{"v":1,"outbound":{"exceptNets":["10.0.0.0/33"]}}`,
		`outbound.exceptNets[0]: "10.0.0.0/33": want a CIDR such as 10.0.0.0/8 or fd00::/8`},
	{`{"v":1,"outbound":{"exceptNets":["fd00::/129"]}}`,
		`outbound.exceptNets[0]: "fd00::/129": want a CIDR such as 10.0.0.0/8 or fd00::/8`},
	{`{"v":1,"outbound":{"exceptNets":["10.0.0.0/-1"]}}`,
		`outbound.exceptNets[0]: "10.0.0.0/-1": want a CIDR such as 10.0.0.0/8 or fd00::/8`},
	{`{"v":1,"outbound":{"exceptNets":["10.0.0.0/08"]}}`,
		`outbound.exceptNets[0]: "10.0.0.0/08": want a CIDR such as 10.0.0.0/8 or fd00::/8`},
	{`{"v":1,"outbound":{"exceptNets":["10.0.0/8"]}}`,
		`outbound.exceptNets[0]: "10.0.0/8": want a CIDR such as 10.0.0.0/8 or fd00::/8`},
	{`{"v":1,"outbound":{"exceptNets":["10.0.0.0/"]}}`,
		`outbound.exceptNets[0]: "10.0.0.0/": want a CIDR such as 10.0.0.0/8 or fd00::/8`},
	{`{"v":1,"outbound":{"exceptNets":["/8"]}}`,
		`outbound.exceptNets[0]: "/8": want a CIDR such as 10.0.0.0/8 or fd00::/8`},
	{`{"v":1,"outbound":{"exceptNets":["10.0.0.0/255.0.0.0"]}}`,
		`outbound.exceptNets[0]: "10.0.0.0/255.0.0.0": want a CIDR such as 10.0.0.0/8 or fd00::/8`},
	{`{"v":1,"outbound":{"exceptNets":["010.0.0.0/8"]}}`,
		`outbound.exceptNets[0]: "010.0.0.0/8": want a CIDR such as 10.0.0.0/8 or fd00::/8`},
	{`{"v":1,"outbound":{"exceptNets":["::ffff:10.0.0.0/104"]}}`,
		`outbound.exceptNets[0]: "::ffff:10.0.0.0/104": IPv4 in IPv6 notation never matches a packet; write an IPv4 CIDR of 10.0.0.0`},
	{`{"v":1,"outbound":{"exceptNets":["::ffff:10.0.0.1"]}}`,
		`outbound.exceptNets[0]: "::ffff:10.0.0.1": want a CIDR; write 10.0.0.1/32`},
	{`{"v":1,"outbound":{"exceptNets":["10.0.0.0/8,192.168.0.0/16"]}}`,
		`outbound.exceptNets[0]: "10.0.0.0/8,192.168.0.0/16": want a CIDR such as 10.0.0.0/8 or fd00::/8`},
	{`{"v":1,"outbound":{"exceptNets":["10.0.0.0-10.0.0.9"]}}`,
		`outbound.exceptNets[0]: "10.0.0.0-10.0.0.9": want a CIDR such as 10.0.0.0/8 or fd00::/8`},
	{`{"v":1,"outbound":{"exceptNets":["example.com"]}}`,
		`outbound.exceptNets[0]: "example.com": want a CIDR such as 10.0.0.0/8 or fd00::/8`},
	{`{"v":1,"outbound":{"exceptNets":["[fd00::]/8"]}}`,
		`outbound.exceptNets[0]: "[fd00::]/8": want a CIDR such as 10.0.0.0/8 or fd00::/8`},
	{`{"v":1,"outbound":{"nets":"10.0.0.0/8"}}`,
		`outbound.nets: "10.0.0.0/8": want a list of CIDRs such as ["10.0.0.0/8"]`},
	{`{"v":1,"outbound":{"nets":[10]}}`,
		`outbound.nets[0]: 10: want a CIDR in a string, such as "10.0.0.0/8" or "fd00::/8"`},
	{`{"v":1,"outbound":{"nets":[null]}}`,
		`outbound.nets[0]: null: want a CIDR in a string, such as "10.0.0.0/8" or "fd00::/8"`},
	{`{"v":1,"outbound":{"nets":["10.0.0.0/8","x"]}}`,
		`outbound.nets[1]: "x": want a CIDR such as 10.0.0.0/8 or fd00::/8`},
	{`{"v":1,"outbound":{"nets":{}}}`,
		`outbound.nets: {}: want a list of CIDRs such as ["10.0.0.0/8"]`},
	{`{"v":1,"inbound":{"exceptSources":["any"]}}`,
		`inbound.exceptSources[0]: "any": want a CIDR such as 10.0.0.0/8 or fd00::/8`},
	// modes
	{`{"v":1,"inbound":{"port":1,"mode":"REDIRECT"}}`,
		`inbound.mode: "REDIRECT": want "redirect" or "tproxy"`},
	{`{"v":1,"inbound":{"port":1,"mode":"nat"}}`,
		`inbound.mode: "nat": want "redirect" or "tproxy"`},
	{`{"v":1,"inbound":{"port":1,"mode":"proxy-protocol"}}`,
		`inbound.mode: "proxy-protocol": want "redirect" or "tproxy"`},
	{`{"v":1,"inbound":{"port":1,"mode":1}}`,
		`inbound.mode: 1: want a string`},
	{`{"v":1,"inbound":{"port":1,"mode":null}}`,
		`inbound.mode: null: want a string`},
	{`{"v":1,"inbound":{"port":1,"mode":" tproxy"}}`,
		`inbound.mode: " tproxy": want "redirect" or "tproxy"`},
	{`{"v":1,"udp":{"mode":"redirect"}}`,
		`udp.mode: "redirect": want "proxy-protocol" or "tproxy"`},
	{`{"v":1,"udp":{"mode":[]}}`,
		`udp.mode: []: want a string`},
	// interfaces
	{`{"v":1,"exceptInterfaces":"eth1"}`,
		`exceptInterfaces: "eth1": want a list`},
	{`{"v":1,"exceptInterfaces":[1]}`,
		`exceptInterfaces[0]: 1: want a string`},
	{`{"v":1,"exceptInterfaces":[""]}`,
		`exceptInterfaces[0]: "": want the name of one interface, such as eth1, of at most 15 characters`},
	{`{"v":1,"exceptInterfaces":["eth0","*"]}`,
		`exceptInterfaces[1]: "*": want the name of one interface, such as eth1, of at most 15 characters`},
	{`{"v":1,"exceptInterfaces":["eth+"]}`,
		`exceptInterfaces[0]: "eth+": want the name of one interface, such as eth1, of at most 15 characters`},
	{`{"v":1,"exceptInterfaces":["a/b"]}`,
		`exceptInterfaces[0]: "a/b": want the name of one interface, such as eth1, of at most 15 characters`},
	{`{"v":1,"exceptInterfaces":["eth0:1"]}`,
		`exceptInterfaces[0]: "eth0:1": want the name of one interface, such as eth1, of at most 15 characters`},
	{`{"v":1,"exceptInterfaces":["."]}`,
		`exceptInterfaces[0]: ".": want the name of one interface, such as eth1, of at most 15 characters`},
	{`{"v":1,"exceptInterfaces":[".."]}`,
		`exceptInterfaces[0]: "..": want the name of one interface, such as eth1, of at most 15 characters`},
	{`{"v":1,"exceptInterfaces":["eth 1"]}`,
		`exceptInterfaces[0]: "eth 1": want the name of one interface, such as eth1, of at most 15 characters`},
	{`{"v":1,"exceptInterfaces":["sixteen-chars-xx"]}`,
		`exceptInterfaces[0]: "sixteen-chars-xx": want the name of one interface, such as eth1, of at most 15 characters`},
	{`{"v":1,"exceptInterfaces":["e\u0000"]}`,
		`exceptInterfaces[0]: "e\x00": want the name of one interface, such as eth1, of at most 15 characters`},
	{`{"v":1,"exceptInterfaces":["\u00e9th0"]}`,
		`exceptInterfaces[0]: "éth0": want the name of one interface, such as eth1, of at most 15 characters`},
	{`{"v":1,"exceptInterfaces":["a\"b"]}`,
		`exceptInterfaces[0]: "a\"b": want the name of one interface, such as eth1, of at most 15 characters`},
	{`{"v":1,"exceptInterfaces":["a\\b"]}`,
		`exceptInterfaces[0]: "a\\b": want the name of one interface, such as eth1, of at most 15 characters`},
	{`{"v":1,"exceptInterfaces":{}}`,
		`exceptInterfaces: {}: want a list`},
}

func TestParseErrors(t *testing.T) {
	for _, m := range mistakes {
		p, err := redirect.Parse(m.policy)
		var field *redirect.FieldError
		switch {
		case err == nil:
			t.Errorf("Parse(%#q) = %v, want the error\n\t%s", m.policy, p, m.want)
		case !errors.As(err, &field):
			t.Errorf("Parse(%#q): error of type %T, want *FieldError", m.policy, err)
		case err.Error() != m.want:
			t.Errorf("Parse(%#q): error\n\t%s\nwant\n\t%s", m.policy, err, m.want)
		}
	}
}

// TestParseAccepts holds what is well-formed: each policy and how it prints.
func TestParseAccepts(t *testing.T) {
	for _, tt := range []struct{ policy, want string }{
		{`{}`, `{"v":1}`},
		{" {\n } ", `{"v":1}`},
		{`{"v":1}`, `{"v":1}`},
		{"\t{\r\n\"v\" : 1 }\n", `{"v":1}`},
		{`{"\u0076":1}`, `{"v":1}`}, // a name may be written with escapes

		// Lists and objects that are null are empty: clients write them so.
		{`{"v":1,"proxy":null,"inbound":null,"outbound":null,"udp":null,"dns":null,"exceptInterfaces":null}`, `{"v":1}`},
		{`{"v":1,"proxy":{"uids":null,"gids":null},"inbound":{"exceptSources":null},"outbound":{"nets":null,"exceptNets":null,"exceptUIDs":null}}`, `{"v":1}`},
		{`{"v":1,"proxy":{"uids":[],"gids":[],"hairpin":false},"outbound":{"port":0,"ports":"","nets":[]}}`, `{"v":1}`},

		// The edges of numbers.
		{`{"v":1,"dns":{"port":65535}}`, `{"v":1,"dns":{"port":65535}}`},
		{`{"v":1,"proxy":{"uids":[0,65536,4294967294],"gids":[4294967294]}}`, `{"v":1,"proxy":{"uids":[0,65536,4294967294],"gids":[4294967294]}}`},

		// Sets in any order, with doubles, are the same policy.
		{`{"v":1,"proxy":{"uids":[2102,7,2102],"gids":[2,1,2]},"outbound":{"port":1,"exceptUIDs":[1,0,1]},"exceptInterfaces":["eth2","eth1","eth2"]}`,
			`{"v":1,"proxy":{"uids":[7,2102],"gids":[1,2]},"outbound":{"port":1,"exceptUIDs":[0,1]},"exceptInterfaces":["eth1","eth2"]}`},

		// Port sets: blanks around items, order, overlaps and neighbours.
		{`{"v":1,"outbound":{"port":1,"exceptPorts":" 80 ,\t443,9000-9100 "}}`, `{"v":1,"outbound":{"port":1,"exceptPorts":"80,443,9000-9100"}}`},
		{`{"v":1,"outbound":{"port":1,"exceptPorts":" \t "}}`, `{"v":1,"outbound":{"port":1}}`},
		{`{"v":1,"outbound":{"port":1,"exceptPorts":"443,80,80,81-90,85-100,101,103"}}`, `{"v":1,"outbound":{"port":1,"exceptPorts":"80-101,103,443"}}`},
		{`{"v":1,"outbound":{"port":1,"exceptPorts":"1-65535,7,65535"}}`, `{"v":1,"outbound":{"port":1,"exceptPorts":"1-65535"}}`},
		{`{"v":1,"outbound":{"port":1,"exceptPorts":"65534-65535,65535"}}`, `{"v":1,"outbound":{"port":1,"exceptPorts":"65534-65535"}}`},
		{`{"v":1,"outbound":{"port":1,"exceptPorts":"8895-8895"}}`, `{"v":1,"outbound":{"port":1,"exceptPorts":"8895"}}`},

		// Networks: blanks, host bits, order, families, one inside another.
		{`{"v":1,"outbound":{"port":1,"nets":[" 10.1.2.3/8 ","\tfd00::1/8"]}}`, `{"v":1,"outbound":{"port":1,"nets":["10.0.0.0/8","fd00::/8"]}}`},
		{`{"v":1,"outbound":{"port":1,"nets":["fd00::/8","10.0.0.0/8","10.0.0.0/9","10.200.0.0/16","10.0.0.0/8","9.0.0.0/8"]}}`, `{"v":1,"outbound":{"port":1,"nets":["9.0.0.0/8","10.0.0.0/8","fd00::/8"]}}`},
		{`{"v":1,"outbound":{"port":1,"nets":["0.0.0.0/0","::/0","::1/128","10.0.0.1/32"]}}`, `{"v":1,"outbound":{"port":1,"nets":["0.0.0.0/0","::/0"]}}`},
		{`{"v":1,"outbound":{"port":1,"nets":["FD00:0:0::/16"]}}`, `{"v":1,"outbound":{"port":1,"nets":["fd00::/16"]}}`},

		{`{"v":1,"inbound":{"port":1,"mode":""}}`, `{"v":1,"inbound":{"port":1}}`},
		{`{"v":1,"inbound":{"port":1,"mode":"tproxy"}}`, `{"v":1,"inbound":{"port":1,"mode":"tproxy"}}`},
		{`{"v":1,"exceptInterfaces":["eth0.100","fifteen-chars-x","net1@x"]}`, `{"v":1,"exceptInterfaces":["eth0.100","fifteen-chars-x","net1@x"]}`},
	} {
		p, err := redirect.Parse(tt.policy)
		if err != nil {
			t.Errorf("Parse(%#q): %v", tt.policy, err)
			continue
		}
		if p.String() != tt.want {
			t.Errorf("Parse(%#q) prints\n\t%s\nwant\n\t%s", tt.policy, p, tt.want)
		}
	}
}

// TestEveryFieldRefusesEveryOtherType puts each kind of JSON value in each field.
func TestEveryFieldRefusesEveryOtherType(t *testing.T) {
	const (
		number, boolean, text, list, object, null = `1`, `true`, `"zzz"`, `[{}]`, `{"zzz":1}`, `null`
	)
	all := []string{number, boolean, text, list, object, null}
	for field, good := range map[string][]string{
		"v":                     {number},
		"proxy":                 {null},
		"proxy.uids":            {null},
		"proxy.gids":            {null},
		"proxy.hairpin":         {boolean},
		"inbound":               {null},
		"inbound.port":          {number},
		"inbound.mode":          {},
		"inbound.ports":         {},
		"inbound.exceptPorts":   {},
		"inbound.exceptSources": {null},
		"outbound":              {null},
		"outbound.port":         {number},
		"outbound.ports":        {},
		"outbound.exceptPorts":  {},
		"outbound.nets":         {null},
		"outbound.exceptNets":   {null},
		"outbound.exceptUIDs":   {null},
		"udp":                   {null},
		"udp.mode":              {},
		"udp.inboundPort":       {number},
		"udp.outboundPort":      {number},
		"dns":                   {null},
		"dns.port":              {number},
		"exceptInterfaces":      {null},
	} {
		accepts := map[string]bool{}
		for _, g := range good {
			accepts[g] = true
		}
		for _, value := range all {
			policy := `{"v":1,` + nest(field, value) + `}`
			if field == "v" {
				policy = `{"v":` + value + `}`
			}
			_, err := redirect.Parse(policy)
			if accepts[value] {
				if err != nil {
					t.Errorf("Parse(%s): %v", policy, err)
				}
				continue
			}
			var fe *redirect.FieldError
			if !errors.As(err, &fe) {
				t.Errorf("Parse(%s): %v, want a *FieldError of %s", policy, err, field)
				continue
			}
			// The list and the object have something wrong inside as well.
			if fe.Field != field && !strings.HasPrefix(fe.Field, field+"[") && !strings.HasPrefix(fe.Field, field+".") {
				t.Errorf("Parse(%s): error of field %q, want %s", policy, fe.Field, field)
			}
		}
	}
}

// nest writes "a.b", value as "a":{"b":value}.
func nest(field, value string) string {
	outer, inner, nested := strings.Cut(field, ".")
	if nested {
		return fmt.Sprintf("%q:{%s}", outer, nest(inner, value))
	}
	return fmt.Sprintf("%q:%s", outer, value)
}

// TestRoundTrip prints a policy that sets every field and reads it back.
func TestRoundTrip(t *testing.T) {
	const whole = `{"v":1,` +
		`"proxy":{"uids":[0,2102],"gids":[4294967294],"hairpin":true},` +
		`"inbound":{"port":8901,"mode":"tproxy","ports":"80,443","exceptPorts":"1-9,8887","exceptSources":["192.0.2.0/24","2001:db8::/32"]},` +
		`"outbound":{"port":8900,"ports":"80-90","exceptPorts":"53","nets":["10.0.0.0/8","fd00::/8"],"exceptNets":["10.1.0.0/16"],"exceptUIDs":[0]},` +
		`"udp":{"mode":"tproxy","inboundPort":8909,"outboundPort":8908},` +
		`"dns":{"port":15053},` +
		`"exceptInterfaces":["eth1"]}`
	p, err := redirect.Parse(whole)
	if err != nil {
		t.Fatal(err)
	}
	if p.String() != whole {
		t.Errorf("printed\n\t%s\nwant\n\t%s", p, whole)
	}
	q, err := redirect.Parse(p.String())
	if err != nil {
		t.Fatal(err)
	}
	if !p.Equal(q) {
		t.Errorf("read back\n\t%s\nwant\n\t%s", q, p)
	}
}

// TestZeroPolicy holds that what redirects nothing compiles to nothing, whatever
// exceptions it lists.
func TestZeroPolicy(t *testing.T) {
	for _, text := range []string{
		`{}`, `{"v":1}`,
		`{"v":1,"proxy":{"uids":[2102],"hairpin":true}}`,
		`{"v":1,"outbound":{"exceptPorts":"53","nets":["10.0.0.0/8"],"exceptUIDs":[0]},"inbound":{"mode":"tproxy","ports":"80"},"exceptInterfaces":["eth1"]}`,
	} {
		p, err := redirect.Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		if !p.IsZero() || len(p.Rules()) != 0 {
			t.Errorf("%s: IsZero %v, rules\n%s", text, p.IsZero(), redirect.Print(p.Rules()))
		}
	}
	if p := (&redirect.Policy{}); !p.IsZero() || len(p.Rules()) != 0 {
		t.Errorf("the zero Policy redirects: %s", redirect.Print(p.Rules()))
	}
}
