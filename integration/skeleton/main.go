// Program skeleton is the least a CNI plugin in Go can be: it reads its
// configuration and passes the previous result on. Demo and benchmarks measure
// Preroute against it, so it is built with the same flags.
package main

import (
	"encoding/json"
	"errors"
	"fmt"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"

	_ "github.com/containernetworking/cni/pkg/types/020"
	_ "github.com/containernetworking/cni/pkg/types/040"
	_ "github.com/containernetworking/cni/pkg/types/100"
)

func main() {
	nothing := func(*skel.CmdArgs) error { return nil }
	skel.PluginMainFuncs(skel.CNIFuncs{
		Add: add, Check: nothing, Del: nothing, GC: nothing, Status: nothing,
	}, version.All, "skeleton: passes the previous result on")
}

func add(args *skel.CmdArgs) error {
	var conf types.PluginConf
	if err := json.Unmarshal(args.StdinData, &conf); err != nil {
		return fmt.Errorf("reading the plugin's configuration: %w", err)
	}
	if err := version.ParsePrevResult(&conf); err != nil {
		return fmt.Errorf("reading prevResult: %w", err)
	}
	if conf.PrevResult == nil {
		return errors.New("no prevResult: chain this plugin behind another")
	}
	return types.PrintResult(conf.PrevResult, conf.CNIVersion)
}
